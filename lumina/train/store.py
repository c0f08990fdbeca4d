"""Checkpoints as folders: their names, their manifests, finding a sound one, keeping some (law 5). Loads no torch.

A checkpoint is a folder `step-00000120` of one safetensors file per rank, `trainer.json` and `manifest.json`. It is
written under a name of its own that begins with a dot (lumina.train.writing), flushed, hashed into the manifest, and
only then named. A kill at any moment leaves either the folder without its name, which is ignored, or the whole. Before
loading, every hash is checked, and a damaged checkpoint is passed over with a warning in favour of the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumina.config import UserError

log = logging.getLogger("lumina")

FORMAT = 1
MANIFEST, TRAINER, BEST = "manifest.json", "trainer.json", "best.json"
_NAME = re.compile(r"^step-(\d{8,})$")


@dataclass
class Progress:
    """Where a run stands. `step` counts optimizer steps done, which is also the data position (law 1)."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    global_batch_size: int = 0
    data_fingerprint: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = ""
    zero_stage: int = 0
    world: int = 1
    guard: dict[str, Any] = field(default_factory=dict)  # baselines of lumina.train.recovery.spikes
    lora: dict[str, Any] = field(default_factory=dict)  # rank, alpha and targets of the adapters that are all it holds
    base: dict[str, str] = field(default_factory=dict)  # the checkpoint under them (lumina.train.reading.reference)


# --- Files ----------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def name_of(step: int) -> str:
    return f"step-{step:08d}"


# --- Retention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retention:
    """What is kept: the newest `last`, every one whose step is a multiple of `every`, and the best one."""

    last: int
    every: int | None = None
    best: bool = True

    def kept(self, steps: list[int], best: int | None) -> set[int]:
        """The steps to keep of `steps`."""
        newest = set(sorted(steps, reverse=True)[: self.last])
        multiples = {step for step in steps if self.every is not None and step % self.every == 0}
        return newest | multiples | ({best} & set(steps) if self.best and best is not None else set())


def prune(folder: Path, keep: Retention | int) -> list[Path]:
    """Remove the checkpoints that are not to be kept, and what earlier removals left; returns the removed ones. Rank 0
    only."""
    keep = Retention(keep) if isinstance(keep, int) else keep
    found = checkpoints(folder)
    kept = keep.kept([step_of(path) for path in found], best_step(folder))
    removed = [path for path in found if step_of(path) not in kept]
    for path in removed:
        doom(path)
    for leftover in folder.glob(".*.doomed"):
        shutil.rmtree(leftover, ignore_errors=True)
    return removed


def doom(checkpoint: Path) -> None:
    """Take a checkpoint's name away, then its files: a kill while deleting leaves no half checkpoint behind."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.doomed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what earlier starts of the run left unfinished. Only for the start that owns the run now."""
    for leftover in [*folder.glob(".*.doomed"), *folder.glob(".*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for scratch in folder.glob(".*.partial"):
        scratch.unlink(missing_ok=True)


def mark_best(folder: Path, step: int, loss: float) -> None:
    write_json(folder / BEST, {"step": step, "loss": loss})


def best_step(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / BEST).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


# --- Finding and checking -------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Named checkpoints, newest first."""
    found = [path for path in folder.glob("step-*") if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None when every size and hash is right."""
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
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        hashes = pool.map(lambda file: digest(checkpoint / file[0]), files)
        for (name, _, sha256), found in zip(files, hashes, strict=True):
            if found != sha256:
                pool.shutdown(wait=False, cancel_futures=True)
                return f"{name} does not match its hash"
    return None


def newest_sound(candidates: list[Path]) -> Path | None:
    """The first candidate without damage; the damaged ones before it are reported."""
    for checkpoint in candidates:
        wrong = damage(checkpoint)
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
    if _NAME.match(given.name) and given.is_dir():
        older = [c for c in checkpoints(given.parent) if step_of(c) < step_of(given)]
        return [given, *older]
    for folder in (given / "checkpoints", given):
        if folder.is_dir() and (found := checkpoints(folder)):
            return found
    raise UserError(
        f"no checkpoint at {given}", "Give a run's folder (experiments/NAME) or one of its checkpoints/step-… folders."
    )


def read_progress(checkpoint: Path) -> tuple[Progress, dict[str, Any]]:
    """The progress and the whole of trainer.json."""
    trainer = json.loads((checkpoint / TRAINER).read_text())
    known = {name: trainer[name] for name in Progress.__dataclass_fields__ if name in trainer}
    return Progress(**known), trainer
