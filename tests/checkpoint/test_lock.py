"""The newest start owns the run's folder; only its own launch goes on by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina.checkpoint.lock import NAME, RunLock, last_global_batch
from lumina.config import UserError


def test_a_later_claim_takes_it(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run", "job", 8)
    first.assert_held()
    second = RunLock(tmp_path / "run", "job", 8)
    assert second.held()
    assert not first.held(), "a node that wakes up must find that it has lost the folder"
    with pytest.raises(UserError, match="another start of this run owns"):
        first.assert_held()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME], "nothing else is left behind"


def test_two_runs_do_not_meet(tmp_path: Path) -> None:
    one, other = RunLock(tmp_path / "a", "job", 8), RunLock(tmp_path / "b", "job", 8)
    assert one.held()
    assert other.held()


@pytest.mark.parametrize("text", [None, "", "[]", '{"token": "x"', "{}"])
def test_a_lost_or_torn_file_is_not_held(text: str | None, tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "job", 8)
    (tmp_path / NAME).unlink()
    if text is not None:
        (tmp_path / NAME).write_text(text)
    assert not lock.held()
    assert last_global_batch(tmp_path, "job") is None


def test_only_the_same_launch_goes_on(tmp_path: Path) -> None:
    assert last_global_batch(tmp_path, "job") is None, "there was no start"
    RunLock(tmp_path, "job", 24)
    assert last_global_batch(tmp_path, "job") == 24
    assert last_global_batch(tmp_path, "another") is None
    assert last_global_batch(tmp_path, None) is None, "a run started by hand must be told to resume"
    RunLock(tmp_path, None, 24)
    assert last_global_batch(tmp_path, "job") is None, "the last start was somebody else's"
    assert last_global_batch(tmp_path, None) is None


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the run's folder .*file/run cannot be written: Not a directory"):
        RunLock(tmp_path / "file/run", None, 1)
