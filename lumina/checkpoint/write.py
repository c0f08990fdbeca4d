"""Writes a checkpoint: a safetensors file from each rank, and a commit by rank 0 (law 5). Without a collective, so that
it may happen on a thread beside the training.

Each rank writes its tensors into a folder that only this save of this start of the run uses, flushes them to disk and
leaves an entry with their hash there. Rank 0 waits for every entry, writes the manifest of them all, flushes that, and
only then renames the folder to its name. Whatever fails leaves the folder unnamed and every older checkpoint as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lumina.checkpoint.format import FORMAT, MANIFEST, TRAINER, name_of, rank_name
from lumina.checkpoint.integrity import manifest_entry
from lumina.checkpoint.retention import set_aside
from lumina.checkpoint.snapshot import Snapshot
from lumina.files import file_sha256, fsync, read_json, write_json

_BLOCK = 16 * 2**20
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}
# What will be as it is however often it is tried: a read-only file system, no permission, a file where a folder goes.
_PERMANENT = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


class SaveError(Exception):
    """A checkpoint was not written; `retry`: whether trying again can help."""

    def __init__(self, reason: str, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry


def partial_name(step: int, start: str, attempt: int) -> str:
    """The unnamed folder of one save: no other start of the run, and no other attempt, uses it."""
    return f".{name_of(step)}.{start}-{attempt}.partial"


# --- Every rank -----------------------------------------------------------------------------------


def write_rank_file(partial: Path, snapshot: Snapshot, rank: int, world: int) -> None:
    """Write this rank's safetensors file, and its manifest entry for rank 0 to collect. Raises SaveError."""
    try:
        snapshot.wait()
        partial.mkdir(parents=True, exist_ok=True)
        own = partial / rank_name(rank, world)
        sha256 = _write_tensors(own, snapshot)
        fsync(own)
        write_json(_entry_path(partial, rank), {"name": own.name, "bytes": own.stat().st_size, "sha256": sha256})
    except Exception as error:
        with suppress(OSError):  # an empty file needs no room on a full disk
            _failed_path(partial, rank).touch()
        raise _as_save_error(error) from error


def unwritable(folder: Path) -> SaveError | None:
    """Why `folder`, or the nearest above it that is there, takes no file; None where it takes one."""
    try:
        tempfile.TemporaryFile(dir=_there(folder)).close()
    except OSError as error:
        return SaveError(error.strerror or str(error), retry=error.errno not in _PERMANENT)
    return None


def one_disk(folder: Path, other: Path) -> bool:
    """Whether both are, or are to be made, on one file system. OSError where that cannot be found out."""
    return _there(folder).stat().st_dev == _there(other).stat().st_dev


def _there(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there. A link to nothing stands in the way of both."""
    return next(one for one in (folder, *folder.absolute().parents) if one.exists() or one.is_symlink())


def _entry_path(partial: Path, rank: int) -> Path:
    return partial / f"entry-{rank:05d}.json"


def _failed_path(partial: Path, rank: int) -> Path:
    return partial / f"failed-{rank:05d}"


def _as_save_error(error: Exception) -> SaveError:
    if isinstance(error, SaveError):
        return error
    if isinstance(error, OSError):
        return SaveError(
            f"{error.strerror or error}: {error.filename}" if error.filename else str(error),
            retry=error.errno not in _PERMANENT,
        )
    return SaveError(f"{type(error).__name__}: {error}", retry=True)


def _write_tensors(path: Path, snapshot: Snapshot) -> str:
    """A safetensors file, streamed from the snapshot; returns its SHA-256.

    The library's own writer copies every tensor into a bytes object first, holding the interpreter's lock while it
    does: beside a training loop that stalls it, and it doubles the memory. The format is a length, a JSON header and
    the tensors' bytes (https://github.com/huggingface/safetensors#format); it is read back by the library.
    """
    header: dict[str, Any] = {"__metadata__": {"ranges": json.dumps(snapshot.ranges)}}
    place = 0
    for name, chunks in snapshot.tensors.items():
        numel, dtype = sum(chunk.numel() for chunk in chunks), chunks[0].dtype
        offsets = [place, place + numel * dtype.itemsize]
        header[name] = {"dtype": _DTYPES[dtype], "shape": [numel], "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    hashed = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for early in (len(text).to_bytes(8, "little"), text):
            _write_all(file, memoryview(early))
            hashed.update(early)
        for held in (chunk for chunks in snapshot.tensors.values() for chunk in chunks):
            values = memoryview(held.view(torch.uint8).numpy().data)
            for start in range(0, len(values), _BLOCK):
                block = values[start : start + _BLOCK]
                _write_all(file, block)
                hashed.update(block)
    return hashed.hexdigest()


def _write_all(file: Any, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


# --- From one process -----------------------------------------------------------------------------


def write_checkpoint(folder: Path, snapshots: Iterable[Snapshot], ranks: int) -> Path:
    """Write a whole checkpoint from one process, given what each of `ranks` rank files holds, one at a time; returns
    its path in `folder`. The record of trainer.json is the last snapshot's. Raises SaveError."""
    scratch = secrets.token_hex(4)
    for rank, snapshot in enumerate(snapshots):
        partial = folder / partial_name(snapshot.step, scratch, 1)
        write_rank_file(partial, snapshot, rank, ranks)
    return commit(partial, snapshot, ranks, time.monotonic(), verify=False, may_commit=lambda: True)


# --- Rank 0 ---------------------------------------------------------------------------------------


def commit(
    partial: Path, snapshot: Snapshot, world: int, deadline: float, verify: bool, may_commit: Callable[[], bool]
) -> Path:
    """Wait for every rank's entry until `deadline` (time.monotonic()), write the manifest and give the checkpoint its
    name; returns its path. `verify`: read every file back from the disk first. `may_commit`: asked right before; False
    means that another start holds the run lock now. Raises SaveError, and then the partial folder is gone."""
    final = partial.parent / name_of(snapshot.step)
    try:
        entries = [_wait_for(partial, rank, deadline) for rank in range(world)]
        for rank in range(world):
            _entry_path(partial, rank).unlink()
        write_json(partial / TRAINER, snapshot.trainer)
        entries.append(manifest_entry(partial / TRAINER))
        write_json(partial / MANIFEST, {"format": FORMAT, "files": entries})
        fsync(partial)
        if verify:
            _verify(partial, entries)
        if not may_commit():
            raise SaveError("another start of this run owns its folder now", retry=False)
        if final.exists():  # left by an earlier start of the run: damaged, or skipped when resuming from before it
            set_aside(final)
        os.replace(partial, final)
        fsync(partial.parent)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _as_save_error(error) from error
    return final


def _wait_for(partial: Path, rank: int, deadline: float) -> dict[str, Any]:
    """A rank's entry. Polled, because the ranks' writers share nothing but the folder."""
    pause = 0.002
    while True:
        try:
            found: dict[str, Any] = read_json(_entry_path(partial, rank))
            return found
        except FileNotFoundError:
            pass
        if _failed_path(partial, rank).exists():
            raise SaveError(f"rank {rank} could not write its file", retry=True)
        if time.monotonic() > deadline:
            raise SaveError(f"rank {rank} has not written its file in time", retry=True)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)


def _verify(partial: Path, entries: list[dict[str, Any]]) -> None:
    """Read back what was written, from the disk where the kernel will forget its copy."""
    for found in entries:
        path = partial / found["name"]
        if sys.platform == "linux":
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        if file_sha256(path) != found["sha256"]:
            raise SaveError(f"{path.name} reads back otherwise than it was written", retry=True)
