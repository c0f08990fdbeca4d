"""What is written to the disk: the very format of the library that reads it, and nothing that reads back otherwise."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lumina.checkpoint import (
    SaveError,
    Snapshot,
    commit,
    integrity_error,
    list_checkpoints,
    partial_name,
    write_rank_file,
)
from lumina.files import file_sha256

TENSORS = {
    "master/a": [torch.arange(5.0), torch.arange(5.0, 7.0)],
    "exp_avg/a": [torch.arange(7.0).bfloat16()],
    "exp_avg_sq/a": [torch.arange(7.0).half()],
    "rng/cpu": [torch.arange(16, dtype=torch.uint8)],
    "step": [torch.tensor([2**40, -1])],
}


def snapshot(step: int = 3) -> Snapshot:
    return Snapshot(step, dict(TENSORS), {"a": [14, 7]}, {"step": step})


def written(folder: Path, step: int = 3) -> Path:
    """The unnamed folder of a save by a world of one."""
    partial = folder / partial_name(step, "start", 1)
    write_rank_file(partial, snapshot(step), 0, 1)
    return partial


def named(partial: Path, step: int = 3, verify: bool = True) -> Path:
    return commit(partial, snapshot(step), 1, time.monotonic() + 60, verify, lambda: True)


def rank_file(folder: Path) -> Path:
    return folder / "rank-00000-of-00001.safetensors"


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    """Every type, chunks one after the other, the ranges as metadata; the tensors begin at a multiple of eight, as its
    own writer has them. The folders above need not be there."""
    path = rank_file(written(tmp_path / "run" / "checkpoints"))
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["ranges"]) == {"a": [14, 7]}
        assert set(file.keys()) == set(TENSORS)
        for name, chunks in TENSORS.items():
            found = file.get_tensor(name)
            assert found.dtype is chunks[0].dtype
            assert torch.equal(found, torch.cat(chunks))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    header = path.read_bytes()[8 : 8 + length].decode()
    assert len(header) - len(header.rstrip(" ")) < 8
    assert json.loads(header)["rng/cpu"] == {"dtype": "U8", "shape": [16], "data_offsets": [56, 72]}


def test_more_than_a_block_is_whole(tmp_path: Path) -> None:
    """Longer than what is written at once, by one byte."""
    many = torch.arange(2**24 + 1, dtype=torch.int32).to(torch.uint8)
    partial = tmp_path / partial_name(3, "start", 1)
    write_rank_file(partial, Snapshot(3, {"rng/cpu": [many]}, {}), 0, 1)
    with safe_open(rank_file(partial), framework="pt") as file:
        assert torch.equal(file.get_tensor("rng/cpu"), many)
    entry = json.loads((partial / "entry-00000.json").read_text())
    assert entry["sha256"] == file_sha256(rank_file(partial))


@pytest.mark.parametrize("verify", [True, False])
def test_what_the_manifest_says(verify: bool, tmp_path: Path) -> None:
    final = named(written(tmp_path), verify=verify)
    assert final == tmp_path / "step-00000003"
    assert list(tmp_path.iterdir()) == [final]
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert sorted(path.name for path in final.iterdir() if path.name != "manifest.json") == sorted(
        one["name"] for one in manifest["files"]
    )
    for one in manifest["files"]:
        path = final / one["name"]
        assert (one["bytes"], one["sha256"]) == (path.stat().st_size, file_sha256(path))
    assert json.loads((final / "trainer.json").read_text()) == {"step": 3}
    assert integrity_error(final) is None


def test_what_reads_back_otherwise_is_not_named(tmp_path: Path) -> None:
    """A byte that changed on the way to the disk: found where the files are read back, by a reader otherwise."""
    for verify in (True, False):
        partial = written(tmp_path)
        content = bytearray(rank_file(partial).read_bytes())
        content[-1] ^= 1
        rank_file(partial).write_bytes(content)
        if verify:
            with pytest.raises(
                SaveError, match=f"^{rank_file(partial).name} reads back otherwise than it was"
            ) as failure:
                named(partial)
            assert failure.value.retry
            assert list(tmp_path.iterdir()) == []
        else:
            assert integrity_error(named(partial, verify=False)) is not None


def test_a_checkpoint_of_an_earlier_life_gives_way(tmp_path: Path) -> None:
    old = tmp_path / "step-00000003"
    old.mkdir()
    (old / "trainer.json").write_text("torn")
    assert named(written(tmp_path)) == old
    assert integrity_error(old) is None
    assert list_checkpoints(tmp_path) == [old]


class Broken(Snapshot):
    """A snapshot that cannot be written."""

    error: Any = None

    def wait(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "text", "retry"),
    [
        (ValueError("odd"), "ValueError: odd", True),
        (OSError("no text of the system's"), "no text of the system's", True),
        (OSError(errno.ELOOP, "Loop", "name"), "Loop: name", False),
        (SaveError("as it is", retry=False), "as it is", False),
    ],
    ids=str,
)
def test_a_failure_says_what_and_whether_it_may_pass(error: Exception, text: str, retry: bool, tmp_path: Path) -> None:
    """And rank 0 is told by a file, so that it need not wait in vain."""
    broken = Broken(3, {}, {})
    broken.error = error
    partial = tmp_path / partial_name(3, "start", 1)
    partial.mkdir()
    with pytest.raises(SaveError) as failure:
        write_rank_file(partial, broken, 2, 3)
    assert str(failure.value) == text
    assert failure.value.retry is retry
    assert [path.name for path in partial.iterdir()] == ["failed-00002"]


@pytest.mark.parametrize(("failed", "text"), [(True, "rank 1 could not write its file"), (False, "rank 1 has not")])
def test_a_rank_without_an_entry_fails_the_save(failed: bool, text: str, tmp_path: Path) -> None:
    partial = written(tmp_path)
    if failed:
        (partial / "failed-00001").touch()
    with pytest.raises(SaveError, match=f"^{text}") as failure:
        commit(partial, snapshot(), 2, time.monotonic() + (60 if failed else 0.05), False, lambda: True)
    assert failure.value.retry
    assert list(tmp_path.iterdir()) == []


def test_another_start_that_owns_the_folder_is_obeyed(tmp_path: Path) -> None:
    partial = written(tmp_path)
    with pytest.raises(SaveError, match=r"^another start of this run owns its folder now$") as failure:
        commit(partial, snapshot(), 1, time.monotonic() + 60, False, lambda: False)
    assert not failure.value.retry
    assert list(tmp_path.iterdir()) == []
