"""Outcomes of a step other than the next step: the end of this start (`Stop`), or an action of recovery.

The exit code of the process comes from `StopKind`, never from a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lumina.cluster import EXIT_RESIZE, EXIT_STOPPED


class StopKind(Enum):
    """Why a start of a run ends."""

    FINISHED = "finished"  # every step was taken
    EARLY_STOPPING = "early stopping"  # evaluations without a gain
    SIGNAL = "signal"  # save and end; the run can be resumed
    RESIZE = "resize"  # save and end; the agent starts it again at another world size
    CALLBACK = "callback"  # a callback asked for it
    CALLBACK_FAILED = "callback failed"  # a callback raised an exception on some rank


_EXIT_CODES = {StopKind.SIGNAL: EXIT_STOPPED, StopKind.RESIZE: EXIT_RESIZE}


@dataclass(frozen=True)
class Stop:
    """The run ends here, agreed between all ranks: a checkpoint is saved first. reason: for people; error: raised after
    the save."""

    kind: StopKind
    reason: str = ""
    error: Exception | None = None

    @property
    def exit_code(self) -> int:
        """Of the process, when the checkpoint could be saved."""
        return _EXIT_CODES.get(self.kind, 0)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.kind in (StopKind.FINISHED, StopKind.EARLY_STOPPING)


@dataclass(frozen=True)
class Rewind:
    """Recovery: go back to `checkpoint` and skip the steps `skipped` (from 1) from then on. reason: for people."""

    checkpoint: Path
    skipped: list[int]
    reason: str


@dataclass(frozen=True)
class Fail:
    """Recovery: this start cannot go on. Nothing is saved: the ranks may not stand at the same step."""

    error: Exception


@dataclass(frozen=True)
class HalveMicroBatch:
    """Recovery: step `step` (from 1) ran out of memory; take it again with micro-batches of `batch_size` samples. The
    global batch stays. samples: the step's; failure: what torch said; then: what the numbers of the step before lead
    to, when they were read after it ran out."""

    step: int
    batch_size: int
    samples: Iterable[int]
    failure: str
    then: Outcome = None


Action = Rewind | HalveMicroBatch | Fail
Outcome = Stop | Action | None  # None: the next step follows
