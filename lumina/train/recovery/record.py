"""recovery.json: what recovery has done to a run, for its later starts.

It is written before an action is carried out: a run that is killed in the middle of one comes to the same end (law 6).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lumina.files import read_json, write_json

log = logging.getLogger("lumina")

FILE = "recovery.json"
OLD_FILE = "answers.json"  # up to 0.1.0
_OLD_NAMES = {"past": "skipped_steps", "batch_size": "micro_batch_size"}


@dataclass
class RecoveryRecord:
    """skipped_steps: steps (from 1) that are not trained on; rollbacks: how often the run went back; micro_batches:
    what fitted after running out of memory, each `{"size", "memory"}`, with what made a rank's memory enough for it or
    not (lumina.train.make_engine.Settings.memory); micro_batch_size: the same of versions up to 0.2.0, whatever the
    memory; global_batch_size: of the run, when one of these is set."""

    skipped_steps: list[int] = field(default_factory=list)
    rollbacks: int = 0
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    micro_batches: list[dict[str, Any]] = field(default_factory=list)

    def largest_micro_batch(self, memory: Mapping[str, float]) -> int | None:
        """The largest micro-batch that is known to fit a start with `memory`, None where nothing is known. What a start
        that had less room ran out of tells nothing of one that has more of anything: a lost node that came back, a
        larger sequence_parallel_size, layers that are recomputed."""
        fitting = [
            one["size"]
            for one in self.micro_batches
            if all(value <= one["memory"].get(name, 0.0) for name, value in memory.items())
        ]
        return min([*fitting, *([] if self.micro_batch_size is None else [self.micro_batch_size])], default=None)

    def keep_micro_batch(self, size: int, memory: Mapping[str, float]) -> None:
        """After `size` is all that fits a start with `memory`."""
        others = [one for one in self.micro_batches if one["memory"] != memory]
        self.micro_batches = [*others, {"size": size, "memory": dict(memory)}]

    @classmethod
    def read(cls, folder: Path) -> RecoveryRecord:
        """The record in a run's folder; an empty one where there is none, or none that can be read. Writes nothing: who
        reads it may not own the run yet."""
        try:
            if not (folder / FILE).exists() and (folder / OLD_FILE).exists():
                log.warning("%s is called %s now: what it says is taken over", folder / OLD_FILE, FILE)
                found: dict[str, Any] = read_json(folder / OLD_FILE)
                return cls(**{_OLD_NAMES.get(name, name): value for name, value in found.items()})
            return cls(**read_json(folder / FILE))
        except (OSError, ValueError, TypeError, AttributeError):
            return cls()

    def write(self, folder: Path) -> None:
        """A disk that refuses it is warned of, and stops nothing."""
        try:
            write_json(folder / FILE, asdict(self))
        except OSError as error:
            log.warning("%s could not be written: %s", FILE, error)

    def take_over(self, folder: Path) -> None:
        """Write the record where only an old file has it: by the start that owns the run."""
        if (folder / OLD_FILE).exists() and not (folder / FILE).exists():
            self.write(folder)

    @staticmethod
    def remove(folder: Path) -> None:
        """A run that begins anew has no record."""
        for name in (FILE, OLD_FILE):
            (folder / name).unlink(missing_ok=True)
