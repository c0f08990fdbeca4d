"""events.jsonl: what happened to a run besides its steps, and what was done about it. One JSON object per line.

The file is a history: it is only ever added to, by every start of the run, so a step that was taken again after a
rollback or a resume may have events from each time. A disk that refuses the line never stops the run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger("lumina")

# health: a rule that fired or cleared; recovery: something done about it; save: checkpoints, backups; run: starts, ends
Kind = Literal["health", "recovery", "save", "run"]
RECOVERY = ("recovery", "answer")  # the kind of such an event now, and as version 0.1.0 wrote it
Level = Literal["info", "warn", "crit"]


@dataclass(frozen=True)
class Event:
    """step: optimizer steps done when it happened; time: seconds since 1970; rule: the health rule or recovery, by the
    name that docs/health.md gives it; reason: why, for people; action: what was done, empty for nothing; samples: the
    indices of the samples concerned, if any; values: figures that belong to it."""

    step: int
    kind: Kind
    level: Level
    rule: str
    reason: str
    action: str = ""
    samples: list[int] | None = None
    values: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def line(self) -> str:
        record = {key: _plain(value) for key, value in asdict(self).items() if value not in (None, {})}
        return json.dumps(record) + "\n"


def _plain(value: Any) -> Any:
    """Values that are not finite become null, which every JSON reader takes."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class EventLog:
    """Appends events to a run's file; without a path (other ranks) it only hands them back."""

    def __init__(self, path: Path | None, may_write: Callable[[], bool] = lambda: True) -> None:
        """`may_write`: false once another start of the run owns its folder."""
        self._path, self._may_write = path, may_write
        self._refused = False
        self.listeners: list[Callable[[Event], None]] = []  # called with every event

    def add(
        self,
        step: int,
        kind: Kind,
        level: Level,
        rule: str,
        reason: str,
        action: str = "",
        samples: Iterable[int] | None = None,
        **values: Any,
    ) -> Event:
        listed = None if samples is None else [int(sample) for sample in samples]
        event = Event(step, kind, level, rule, reason, action, listed, values)
        if self._path is not None and self._may_write():
            self._write(event.line())
        for listener in self.listeners:
            listener(event)
        return event

    def _write(self, line: str) -> None:
        assert self._path is not None
        try:
            # Opened anew each time: events are rare, and a file that was moved or remounted is found again. One write
            # call: two writers' lines do not mix.
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # a kill cut the last line short
                os.write(descriptor, (("\n" if torn else "") + line).encode())
            finally:
                os.close(descriptor)
            self._refused = False
        except OSError as error:
            if not self._refused:
                log.warning("an event could not be written to %s: %s", self._path, error)
            self._refused = True


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, in the order in which they happened; lines cut short by a kill are left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record
