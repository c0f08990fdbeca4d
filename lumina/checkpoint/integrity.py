"""Integrity of checkpoints: what the manifest records of every file, and its check before anything is loaded (law 5).
Loads no torch.

A damaged checkpoint is skipped with a warning and the one before it is taken.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lumina.checkpoint.format import FORMAT, MANIFEST, NAME, TRAINER, list_checkpoints, step_of
from lumina.config import UserError, usable_cpus
from lumina.files import file_sha256

log = logging.getLogger("lumina")


def manifest_entry(path: Path) -> dict[str, Any]:
    """A file's manifest entry: its name, size in bytes and SHA-256."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def integrity_error(checkpoint: Path) -> str | None:
    """The first fault of a checkpoint's files against the manifest; None when every size and hash is right."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = [(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} has format {manifest.get('format')}, this version reads {FORMAT}"
    names = [name for name, *_ in files]
    if TRAINER not in names or not any(name.startswith("rank-") for name in names):
        return f"{MANIFEST} does not name {TRAINER} and the files of the ranks"
    for name, size, _ in files:
        path = checkpoint / name
        if Path(name).name != name or not path.is_file():
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
