"""Why one rank ends reaches those that lose it, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina.config import UserError
from lumina.train.deepspeed import Ranks
from lumina.train.recovery.last_word import FILE, LastWord, RestartError


def rank(number: int, start: str = "a", world: int = 2) -> Ranks:
    return Ranks(number, world, number, world, start)


@pytest.mark.parametrize("error", [UserError("no memory", "Start it again."), UserError("odd"), RestartError("half")])
def test_the_others_end_by_the_same(error: UserError | RestartError, tmp_path: Path) -> None:
    LastWord(rank(1), tmp_path).leave(error)
    found = LastWord(rank(0), tmp_path).found()
    assert type(found) is type(error)
    assert str(found) == str(error)
    if isinstance(found, UserError):
        assert found.repeated, "it is told once"


def test_each_machine_tells_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LastWord(Ranks(3, 4, 1, 2, "a"), tmp_path).leave(UserError("no memory"))
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    found = [LastWord(Ranks(number, 4, number, 2, "a"), tmp_path).found() for number in (0, 1)]
    assert [isinstance(error, UserError) and error.repeated for error in found] == [False, True]


def test_it_is_no_word_of_another_start_nor_of_the_rank_itself(tmp_path: Path) -> None:
    LastWord(rank(1), tmp_path).leave(UserError("no memory"))
    assert LastWord(rank(0, "b"), tmp_path).found() is None
    assert LastWord(rank(1), tmp_path).found() is None


def test_where_there_is_none_the_loss_itself_is_told(tmp_path: Path) -> None:
    assert LastWord(rank(0), tmp_path).found() is None
    (tmp_path / FILE).write_text("{")
    assert LastWord(rank(0), tmp_path).found() is None
    (tmp_path / FILE).write_text('{"start": "a"}')
    assert LastWord(rank(0), tmp_path).found() is None


def test_a_rank_alone_or_without_its_run_leaves_nothing(tmp_path: Path) -> None:
    LastWord(rank(0, world=1), tmp_path).leave(UserError("no memory"))
    LastWord(rank(0), tmp_path, may_write=lambda: False).leave(UserError("no memory"))
    assert list(tmp_path.iterdir()) == []
    LastWord(rank(0), tmp_path / "gone").leave(UserError("no memory"))
