"""Integrity of checkpoints: what the manifest records of every file, and its check before anything is loaded (law 5).
Loads no torch.

A damaged checkpoint is skipped with a warning and the one before it is taken.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lumina.checkpoint.format import (
    FORMAT,
    MANIFEST,
    NAME,
    TRAINER,
    list_checkpoints,
    rank_name,
    read_trainer_state,
    step_of,
)
from lumina.config import UserError, usable_cpus
from lumina.files import file_sha256, read_object

log = logging.getLogger("lumina")


def manifest_entry(path: Path) -> dict[str, Any]:
    """A file's manifest entry: its name, size in bytes and SHA-256."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


class ManifestError(ValueError):
    """A manifest that cannot be read, or whose files are no checkpoint. Its text says why."""


def read_manifest(checkpoint: Path) -> list[tuple[str, int, str]]:
    """(name, size in bytes, SHA-256) of every file that belongs to a checkpoint: no other one is ever opened. Raises
    ManifestError."""
    try:
        manifest = read_object(checkpoint / MANIFEST)
        files = [(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in manifest["files"]]
        found = manifest.get("format")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST} cannot be read ({error})") from None
    if found != FORMAT:
        raise ManifestError(f"{MANIFEST} has format {found}, this version reads {FORMAT}")
    names = [name for name, *_ in files]
    for name in names:
        if Path(name).name != name or "\0" in name:  # a path out of the folder
            raise ManifestError(f"{name!r} is no file of the checkpoint: {MANIFEST} names files beside it alone")
    if TRAINER not in names or not _rank_names(names):
        raise ManifestError(f"{MANIFEST} does not name {TRAINER} and the files of the ranks")
    return files


def rank_files(checkpoint: Path) -> list[Path]:
    """The safetensors files of the ranks, in their order. Raises ManifestError."""
    return [checkpoint / name for name in _rank_names([name for name, *_ in read_manifest(checkpoint)])]


def _rank_names(names: list[str]) -> list[str]:
    """Those of the ranks' files: one of each rank, all of one world size. Raises ManifestError."""
    ranks = sorted(name for name in names if name.startswith("rank-"))
    expected = [rank_name(rank, len(ranks)) for rank in range(len(ranks))]
    if ranks != expected:
        wrong = next((own for own, due in zip(ranks, expected, strict=True) if own != due), "")
        raise ManifestError(f"{MANIFEST} names {wrong} among {len(ranks)} files of ranks")
    return ranks


def integrity_error(checkpoint: Path) -> str | None:
    """The first fault of a checkpoint's files against the manifest; None when every size and hash is right."""
    try:
        files = read_manifest(checkpoint)
    except ManifestError as error:
        return str(error)
    for name, size, _ in files:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    # One rank checks for all of them, who wait: so with all its cores (hashlib lets other threads run).
    with ThreadPoolExecutor(min(16, len(usable_cpus()))) as pool:
        hashes = pool.map(lambda file: file_sha256(checkpoint / file[0]), files)
        for (name, _, sha256), found in zip(files, hashes, strict=True):
            if found != sha256:
                pool.shutdown(wait=False, cancel_futures=True)
                return f"{name} does not match its hash"
    try:
        read_trainer_state(checkpoint)
    except (OSError, ValueError) as error:  # written so, by somebody else
        return f"{TRAINER} cannot be read ({error})"
    return None


def latest_valid(candidates: list[Path]) -> Path | None:
    """The first candidate without an integrity error; the damaged ones before it are reported in the log."""
    for checkpoint in candidates:
        wrong = integrity_error(checkpoint)
        if wrong is None:
            return checkpoint
        log.warning("checkpoint %s is damaged: %s; trying the one before it", checkpoint, wrong)
    return None


def candidates(path: str | Path) -> list[Path]:
    """Checkpoints that a path given by a user means, best choice first: a run's folder, its checkpoints folder, or one
    checkpoint (with the older ones of its run behind it, in case it is damaged).

    Raises UserError when there is none.
    """
    given = Path(path)
    if NAME.match(given.name) and given.is_dir():
        older = [c for c in list_checkpoints(given.parent) if step_of(c) < step_of(given)]
        return [given, *older]
    for folder in (given / "checkpoints", given):
        if folder.is_dir() and (found := list_checkpoints(folder)):
            return found
    raise UserError(
        f"no checkpoint at {given}", "Give a run's folder (experiments/NAME) or one of its checkpoints/step-… folders."
    )
