"""Retention: which checkpoints of a folder are kept, and how the others are removed. Loads no torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lumina.checkpoint.format import BEST, list_checkpoints, step_of
from lumina.files import read_json, write_json


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


def prune(folder: Path, keep: Retention | int, step: int | None = None) -> list[Path]:
    """Remove the checkpoints that are not to be kept, and what earlier removals left; returns the removed ones. Rank 0
    only. step: at which the run stands. Later checkpoints are of an earlier start, which this one did not go on from,
    perhaps because they are damaged: they stay, and count for none of those to keep."""
    keep = Retention(keep) if isinstance(keep, int) else keep
    found = [path for path in list_checkpoints(folder) if step is None or step_of(path) <= step]
    kept = keep.kept([step_of(path) for path in found], best_step(folder))
    removed = [path for path in found if step_of(path) not in kept]
    for path in removed:
        discard(path)
    for leftover in _discarded(folder):
        shutil.rmtree(leftover, ignore_errors=True)
    return removed


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint. Rename before deleting, so that a crash leaves no partial checkpoint."""
    shutil.rmtree(set_aside(checkpoint), ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint to a hidden folder, which the next `prune` deletes; returns that folder."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.discarded")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(checkpoint, hidden)
    return hidden


def _discarded(folder: Path) -> list[Path]:
    return [*folder.glob(".*.discarded"), *folder.glob(".*.doomed")]  # doomed: as 0.1.0 named them


def clear_leftovers(folder: Path) -> None:
    """Remove what earlier starts of the run left unfinished. Only for the process that holds the run lock."""
    for leftover in [*_discarded(folder), *folder.glob(".*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for scratch in folder.glob(".*.partial"):
        scratch.unlink(missing_ok=True)


def record_best(folder: Path, step: int, loss: float) -> None:
    """Note in best.json that the checkpoint of `step` has the lowest evaluation loss so far."""
    write_json(folder / BEST, {"step": step, "loss": loss})


def best_step(folder: Path) -> int | None:
    """The step that best.json names, None where there is none or it cannot be read."""
    try:
        return int(read_json(folder / BEST)["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
