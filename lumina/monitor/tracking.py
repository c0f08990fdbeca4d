"""Experiment trackers follow metrics.jsonl: wandb, TensorBoard and MLflow through their own libraries, on rank 0.

metrics.jsonl is the truth. Each tracker has a thread of its own, fed with the same records; when a run goes on, the
thread asks the tracker how far its curves reach and sends only what is missing, so no step is there twice and none is
lost, whatever was killed in between. A tracker that fails or hangs never stops or slows the run.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lumina.config import TRACKERS, UserError, install_command
from lumina.monitor.metrics import read_metrics

log = logging.getLogger("lumina")

# The group of curves that a kind of record is drawn in. Their x axis is the record's step.
GROUPS = {"step": "train", "eval": "eval", "system": "system", "layers": "layers", "ranks": "ranks"}
_ATTEMPTS = 5
_PAUSE, _CLOSING = 5.0, 30.0  # seconds


@dataclass(frozen=True)
class RunInfo:
    """The run as a tracker needs it: its folder, name, settings, and the step it goes on from."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    step: int


class Tracker(Protocol):
    """An experiment tracker. All calls come from one thread; any of them may raise."""

    def open(self, run: RunInfo) -> Mapping[str, int]:
        """Start, or go on with the run that RUN's folder remembers. Returns the last step already there, by group."""

    def scalars(self, group: str, step: int, values: Mapping[str, float], time: float | None) -> None: ...

    def text(self, name: str, step: int, text: str) -> None: ...

    def rewind(self, step: int) -> bool:
        """Forget what is later than `step`, if the service can."""

    def close(self) -> None: ...

    def abandon(self) -> None:
        """Called from another thread when `close` takes too long: end whatever would keep the process from ending."""


def _make(name: str) -> Tracker:
    made: Tracker = TRACKERS.get(name)()
    return made


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite figures of a record, those of nested tables as `table/name`."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif not prefix and name in ("step", "time"):
            continue
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


class _Rewind:
    def __init__(self, step: int) -> None:
        self.step = step


class _Abandon:
    """The end, without another word to the service."""


class _Feed:
    """The thread that feeds one tracker, and its queue."""

    def __init__(
        self,
        name: str,
        run: RunInfo,
        missed: Callable[[], Iterator[Mapping[str, Any]]],
        make: Callable[[str], Tracker],
        pause: float,
    ) -> None:
        self.name = name
        self._make, self._pause = make, pause
        self._run = run
        self._missed = missed
        self._queue: queue.SimpleQueue[Mapping[str, Any] | _Rewind | _Abandon | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._last: dict[str, int] = {}
        self._tracker: Tracker | None = None
        self.failed: str | None = None
        self.thread = threading.Thread(target=self._follow, name=f"lumina-{name}", daemon=True)

    def put(self, item: Mapping[str, Any] | _Rewind | _Abandon | None) -> None:
        if item is None or isinstance(item, _Abandon):
            self._ending.set()
        if self.failed is None:
            self._queue.put(item)

    def abandon(self) -> None:
        """End a tracker that does not end by itself."""
        try:
            if self._tracker is not None:
                self._tracker.abandon()
        except Exception as error:
            log.warning("%s could not be ended: %s: %s", self.name, type(error).__name__, error)

    def _follow(self) -> None:
        try:
            tracker = self._tracker = self._make(self.name)  # in this thread, with the library that it imports
            self._last = dict(tracker.open(self._run))
            for record in self._missed():
                self._send(tracker, record)
            while (item := self._queue.get()) is not None:
                if isinstance(item, _Abandon):
                    return
                if not isinstance(item, _Rewind):
                    self._send(tracker, item)
                elif tracker.rewind(item.step):
                    self._last = {group: min(last, item.step) for group, last in self._last.items()}
            tracker.close()
        except ImportError as error:
            # Of another package's tracker, which distribution has this module is not for us to guess.
            where = f": {install_command('tracking')}" if self.name in TRACKERS.own() else ""
            self._give_up(f"it needs the package {error.name}{where}" if error.name else str(error))
        except UserError as error:
            self._give_up(error.message)
        except BaseException as error:  # a tracker's library may even call sys.exit
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        self.failed = why
        log.warning("%s is no longer followed, the run goes on: %s", self.name, why)

    def _send(self, tracker: Tracker, record: Mapping[str, Any]) -> None:
        kind, step = record["kind"], int(record["step"])
        if kind in ("event", "sample"):
            self._with_retries(lambda: tracker.text(str(record["name"]), step, str(record["text"])))
            return
        group = GROUPS.get(kind, kind)
        if step <= self._last.get(group, -1):
            return
        values = {name.removeprefix(f"{group}/"): value for name, value in scalars(record)}
        if values:
            self._with_retries(lambda: tracker.scalars(group, step, values, record.get("time")))
        self._last[group] = step

    def _with_retries(self, call: Callable[[], None]) -> None:
        """Call, and after a pause again a few times: a service comes back, a wrong key does not."""
        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except Exception as error:
                if attempt == _ATTEMPTS - 1 or self._ending.is_set():
                    raise
                if attempt == 0:
                    log.warning("%s did not take a record, trying again: %s", self.name, error)
                self._ending.wait(self._pause * 2**attempt)


class Trackers:
    """The trackers of a run. `record` never blocks and never raises."""

    def __init__(
        self,
        names: Sequence[str],
        run: RunInfo,
        *,
        make: Callable[[str], Tracker] = _make,
        pause: float = _PAUSE,
        closing: float = _CLOSING,
    ) -> None:
        """`make`: a tracker by its name. `pause`: seconds before the second attempt at a record, doubling. `closing`:
        seconds that each gets to send the rest when the run ends."""
        self._closing = closing
        metrics = run.folder / "metrics.jsonl"
        until = metrics.stat().st_size if metrics.exists() else 0  # later records come through `record`
        self._feeds = [
            _Feed(name, run, lambda: read_metrics(metrics, until), make, pause) for name in dict.fromkeys(names)
        ]
        for feed in self._feeds:
            feed.thread.start()

    def record(self, record: Mapping[str, Any]) -> None:
        """A record as metrics.jsonl has it, or a text: {kind: event or sample, step, name, text}."""
        for feed in self._feeds:
            feed.put(record)

    def rewind(self, step: int) -> None:
        """The run goes back to `step` and takes the later ones again."""
        for feed in self._feeds:
            feed.put(_Rewind(step))

    def close(self) -> None:
        """Let each send the rest; one that does not manage it in half a minute is left behind."""
        for feed in self._feeds:
            feed.put(None)
        for feed in self._feeds:
            feed.thread.join(self._closing)
            if feed.thread.is_alive():
                log.warning("%s had not sent everything %.0f s after the run's end", feed.name, self._closing)
                feed.abandon()

    def abandon(self) -> None:
        """Another start goes on with the run: end them as they are, without what they would write at their end."""
        for feed in self._feeds:
            feed.put(_Abandon())
        for feed in self._feeds:
            feed.thread.join(self._closing)
            feed.abandon()
