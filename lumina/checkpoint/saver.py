"""Asynchronous saver: a thread of each rank that writes checkpoints and backups beside the training.

The loop hands over a snapshot and goes on; one thread at a time writes it. What came of it is fetched at a later step
boundary. A save that fails, or that takes too long, is an outcome, never an exception in the loop.
"""

from __future__ import annotations

import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lumina.checkpoint.format import name_of
from lumina.checkpoint.retention import Retention, prune, record_best
from lumina.checkpoint.snapshot import Snapshot
from lumina.checkpoint.write import SaveError, commit, partial_name, write_rank_file

SaveKind = Literal["checkpoint", "backup"]


@dataclass(frozen=True)
class SaveTarget:
    """Where a snapshot goes: a folder of checkpoints, what is kept there, and whether it is read back."""

    kind: SaveKind
    folder: Path
    keep: Retention
    verify: bool = False


@dataclass
class SaveJob:
    """One snapshot and its targets. best_loss: set when this is the best evaluation so far; requests: who asked for it;
    stall: seconds for which the training waited."""

    snapshot: Snapshot
    targets: Sequence[SaveTarget]
    best_loss: float | None = None
    requests: list[str] = field(default_factory=list)
    stall: float = 0.0


@dataclass(frozen=True)
class SaveOutcome:
    """The result of writing one target: a path, or an error and whether a retry can help. seconds: writing it."""

    job: SaveJob
    kind: SaveKind
    path: Path | None
    seconds: float
    error: str = ""
    retry: bool = False


class Saver:
    """Writes one rank's snapshots on a thread. `start` is the same on all ranks of one start of the run and no other's.
    Every rank begins the same jobs in the same order; only rank 0 learns whether all of them succeeded."""

    def __init__(
        self, rank: int, world: int, start: str, timeout: float, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        self._rank, self._world, self._start, self._timeout = rank, world, start, timeout
        self._attempt = 0
        self._thread: threading.Thread | None = None
        self._done: queue.SimpleQueue[SaveOutcome] = queue.SimpleQueue()
        # Called before a checkpoint gets its name and before pruning; false if a newer launch owns the run (`held` of
        # the run lock).
        self._may_write = may_write

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, job: SaveJob) -> None:
        """Start writing; the snapshot must not change until it is done. Not to be called while busy."""
        assert not self.busy
        self._attempt += 1
        arguments = (job, self._attempt)
        self._thread = threading.Thread(target=self._write, args=arguments, name="lumina-saver", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is being written, at most `seconds` (default: as long as a save may take, and a little).
        Returns whether that is so."""
        if self._thread is not None:
            self._thread.join(self._timeout * 1.1 + 5 if seconds is None else seconds)
        return not self.busy

    def outcomes(self) -> list[SaveOutcome]:
        """What was finished since the last call."""
        found = []
        while not self._done.empty():
            found.append(self._done.get())
        return found

    # --- The thread ---

    def _write(self, job: SaveJob, attempt: int) -> None:
        if sys.platform == "linux":  # a thread's own priority there: the training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        for target in job.targets:
            began = time.monotonic()
            path, error = None, None
            try:
                path = self._write_to(target, job, attempt, began + self._timeout)
            except SaveError as failure:
                error = failure
            except Exception as unexpected:
                error = SaveError(f"{type(unexpected).__name__}: {unexpected}", retry=True)
            seconds = time.monotonic() - began
            said = (str(error), error.retry) if error is not None else ("", False)
            self._done.put(SaveOutcome(job, target.kind, path, seconds, *said))

    def _write_to(self, target: SaveTarget, job: SaveJob, attempt: int, deadline: float) -> Path | None:
        partial = target.folder / partial_name(job.snapshot.step, self._start, attempt)
        try:
            write_rank_file(partial, job.snapshot, self._rank, self._world)
        except SaveError:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self._rank != 0:
            return partial.with_name(name_of(job.snapshot.step))
        path = commit(partial, job.snapshot, self._world, deadline, target.verify, self._may_write)
        if self._may_write():
            if job.best_loss is not None:
                record_best(target.folder, job.snapshot.step, job.best_loss)
            self._clear(target.folder, attempt)
            prune(target.folder, target.keep, job.snapshot.step)
        return path

    def _clear(self, folder: Path, attempt: int) -> None:
        """Remove what failed attempts of this start left; a slow rank may have made a folder anew."""
        for early in folder.glob(f".*.{self._start}-*.partial"):
            if early.name.rsplit("-", 1)[1] != f"{attempt}.partial":
                shutil.rmtree(early, ignore_errors=True)
