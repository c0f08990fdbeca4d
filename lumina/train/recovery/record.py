"""recovery.json: what recovery has done to a run, for its later starts.

It is written before an action is carried out: a run that is killed in the middle of one comes to the same end (law 6).
"""

from __future__ import annotations

import logging
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
    """skipped_steps: steps (from 1) that are not trained on; rollbacks: how often the run went back; micro_batch_size:
    after running out of memory, None for the configured one; global_batch_size: of the run, when that is set."""

    skipped_steps: list[int] = field(default_factory=list)
    rollbacks: int = 0
    micro_batch_size: int | None = None
    global_batch_size: int | None = None

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
