"""The asynchronous saver: ranks that fail or hang, a run lock that was lost, and what is tried again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina import checkpoint
from lumina.checkpoint import Retention, SaveError, SaveJob, Saver, SaveTarget, Snapshot, partial_name, write_rank_file


def make_saver(
    start: str = "a", rank: int = 0, world: int = 1, timeout: float = 20, may_write: Callable[[], bool] = lambda: True
) -> Saver:
    return Saver(rank, world, start, timeout, may_write)


def snapshot(step: int = 1, rank: int = 0, world: int = 1) -> Snapshot:
    """Rank `rank`'s equal share of one parameter of 12 elements, in two chunks as a staging buffer may hold it."""
    share = 12 // world
    values = torch.arange(12.0)[rank * share : (rank + 1) * share]
    tensors = {"rng/cpu": [torch.arange(8, dtype=torch.uint8)], "master/a": [values[:2], values[2:]]}
    return Snapshot(step, tensors, {"a": [rank * share, share]}, {"step": step})


def begin(saver: Saver, folder: Path, step: int = 1, rank: int = 0, world: int = 1) -> None:
    saver.begin(SaveJob(snapshot(step, rank, world), [SaveTarget("checkpoint", folder, Retention(3))]))


def outcome(saver: Saver) -> tuple[bool, str, bool]:
    assert saver.wait()
    (found,) = saver.outcomes()
    return found.path is not None, found.error, found.retry


def test_a_rank_that_never_writes_its_file_fails_the_save_in_time(tmp_path: Path) -> None:
    saver = make_saver(world=2, timeout=0.5)
    begin(saver, tmp_path)
    assert outcome(saver) == (False, "rank 1 has not written its file in time", True)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_failed_fails_the_save_without_waiting_for_the_timeout(tmp_path: Path) -> None:
    saver = make_saver(world=2, timeout=300)
    partial_folder = tmp_path / partial_name(1, "a", 1)
    partial_folder.mkdir()
    (partial_folder / "failed-00001").touch()
    begin(saver, tmp_path)
    assert outcome(saver) == (False, "rank 1 could not write its file", True)


def test_two_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    one, other = make_saver(world=2), make_saver(rank=1, world=2)
    begin(other, tmp_path, rank=1, world=2)
    begin(one, tmp_path, world=2)
    assert outcome(one)[0]
    assert outcome(other)[0]
    (saved,) = checkpoint.list_checkpoints(tmp_path)
    assert checkpoint.integrity_error(saved) is None
    assert sorted(path.name for path in saved.iterdir()) == [
        "manifest.json",
        "rank-00000-of-00002.safetensors",
        "rank-00001-of-00002.safetensors",
        "trainer.json",
    ]
    assert json.loads((saved / "trainer.json").read_text()) == {"step": 1}
    read = torch.empty(12)
    checkpoint.CheckpointReader(saved).read("master", "a", 0, read)
    assert torch.equal(read, torch.arange(12.0))


def test_one_process_writes_the_files_of_several_ranks(tmp_path: Path) -> None:
    saved = checkpoint.write_checkpoint(tmp_path, (snapshot(7, rank, 3) for rank in range(3)), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    assert checkpoint.integrity_error(saved) is None
    assert checkpoint.CheckpointReader(saved).world == 3
    read = torch.empty(12)
    checkpoint.CheckpointReader(saved).read("master", "a", 0, read)
    assert torch.equal(read, torch.arange(12.0))


class Broken(Snapshot):
    """A snapshot that cannot be written."""

    error: Any = None

    def wait(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("number", "retry"), [(errno.ENOSPC, True), (errno.EIO, True), (errno.EROFS, False), (errno.EACCES, False)]
)
def test_what_is_tried_again(tmp_path: Path, number: int, retry: bool) -> None:
    broken = Broken(1, {}, {})
    broken.error = OSError(number, os.strerror(number), "file")
    with pytest.raises(SaveError, match=f"^{os.strerror(number)}: file$") as failure:
        write_rank_file(tmp_path / "partial", broken, 0, 1)
    assert failure.value.retry is retry


def test_a_file_where_the_folder_goes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    saver = make_saver()
    begin(saver, tmp_path / "file")
    written, _, retry = outcome(saver)
    assert not written
    assert not retry


def test_a_start_that_lost_the_run_lock_names_and_removes_nothing(tmp_path: Path) -> None:
    """It wakes up with its files written, while another start's save is under way."""
    stale = make_saver("stale", may_write=lambda: False)
    for step in range(1, 6):
        (tmp_path / checkpoint.name_of(step)).mkdir()
    theirs = tmp_path / partial_name(9, "new", 1)
    theirs.mkdir()
    before = sorted(tmp_path.iterdir())
    begin(stale, tmp_path, step=9)
    assert outcome(stale) == (False, "another start of this run owns its folder now", False)
    assert sorted(tmp_path.iterdir()) == before


def test_a_discarded_checkpoint_of_either_name_is_cleared(tmp_path: Path) -> None:
    """What a kill left between the rename and the deletion, by this version or by 0.1.0."""
    for name in (".step-00000001.doomed", ".step-00000002.discarded"):
        (tmp_path / name).mkdir()
    checkpoint.prune(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
