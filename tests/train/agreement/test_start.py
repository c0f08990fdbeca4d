"""What the ranks find out of each other before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina.config import Config, UserError, load
from lumina.train.agreement import start
from lumina.train.agreement.start import _facts, agree_on_contents, agree_on_start, readers_of
from lumina.train.deepspeed import Ranks
from tests.train.tiny_engines import make_config


def test_what_a_base_was_trained_at_may_be_known_on_some_nodes_only() -> None:
    """No step hangs on it; the scaling that was counted from it is compared."""
    one = load("nano", {"trained_seq_length": 2048, "rope_scaling": {"type": "linear", "factor": 2}})
    assert _facts(one) == _facts(one.replace(trained_seq_length=None))
    assert _facts(one) != _facts(one.replace(rope_scaling={"type": "linear", "factor": 4}))


def test_data_that_a_rank_cannot_look_at_is_told_to_all(tmp_path: Path) -> None:
    """A UserError is what `together` makes of it, on every rank; a bare OSError would be this rank's alone."""
    with pytest.raises(UserError, match="gone"):
        agree_on_contents(Ranks(0, 1, 0, 1, sequence=2), [SimpleNamespace(folder=tmp_path / "gone")])  # type: ignore[list-item]


def test_files_of_a_machine_are_read_once() -> None:
    """Where they are not one on all machines; ranks whose folders differ on one machine each read their own."""
    one, other = [(1, 10, 5)], [(2, 10, 5)]
    assert readers_of([("n0", one), ("n0", one), ("n1", one)]) is None, "they are one file system's"
    assert readers_of([("n0", one), ("n0", one), ("n1", other), ("n1", other)]) == [0, 0, 2, 2]
    assert readers_of([("n0", one), ("n0", other), ("n1", one), ("n0", other)]) == [0, 1, 2, 1]


def agree_with_another(config: Config, monkeypatch: pytest.MonkeyPatch, unseen: str = "") -> None:
    """On the first of two machines with a rank each. unseen: a folder of which the other has one of its own."""

    def both(ranks: Ranks, what: str, own: Any, conclude: Callable[[list[Any]], None]) -> None:
        theirs = {str(folder): "elsewhere" for folder in (config.output_dir, config.backup_dir)}
        marks = own.marks | {folder: mark for folder, mark in theirs.items() if Path(folder).name == unseen}
        conclude([own, replace(own, host="n1", marks=marks)])

    monkeypatch.setattr(start, "gathered", both)
    monkeypatch.setattr(start, "_VISIBLE", 0.0)
    agree_on_start(config, Ranks(0, 2, 0, 1))


def with_backups(folder: Path, name: str) -> Config:
    return make_config(
        output_dir=str(folder / "runs"),
        experiment_name="run",
        backup_dir=str(folder / name),
        backup_every_n_batches=1,
    )


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("name", "unseen", "refused", "warned"),
    [
        ("file/backups", "", "Not a directory", "Not a directory; each backup that is due is tried"),
        ("away", "away", None, "No such file or directory; each backup that is due is tried"),
        ("disk", "disk", "disk is not one folder of all machines", "disk is not one folder of all machines"),
    ],
)
def test_backups_end_only_a_run_that_begins(
    name: str,
    unseen: str,
    refused: str | None,
    warned: str,
    begun: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On several machines as on one (tests/train/saving/test_places.py); and what may pass, as a disk that is away,
    ends none."""
    (tmp_path / "file").touch()
    (tmp_path / "away").symlink_to(tmp_path / "unmounted/backups")
    if begun:  # if only before its first checkpoint
        (tmp_path / "runs/run").mkdir(parents=True)
        (tmp_path / "runs/run/.owner.json").write_text('{"token": "a"}')
    config = with_backups(tmp_path, name)
    if refused is None or begun:
        agree_with_another(config, monkeypatch, unseen)
        assert warned in caplog.text
    else:
        with pytest.raises(UserError, match=refused):
            agree_with_another(config, monkeypatch, unseen)
    assert not any(path.name.startswith(".lumina-start") for path in tmp_path.rglob("*"))


def test_checkpoints_need_one_folder_of_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/run/checkpoints/step-00000002").mkdir(parents=True)
    with pytest.raises(UserError, match="runs is not one folder of all machines"):
        agree_with_another(with_backups(tmp_path, "disk"), monkeypatch, "runs")
