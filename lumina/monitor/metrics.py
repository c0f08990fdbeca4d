"""metrics.jsonl: one JSON object per line, a line per step, per evaluation and per other measurement.
No step is there twice.

Values that are not finite are written as null, which every JSON reader takes.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import orjson

from lumina.files import write_text
from lumina.monitor.step_record import StepRecord

log = logging.getLogger("lumina")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return list(map(_plain, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path, until: int | None = None) -> Iterator[dict[str, Any]]:
    """The records of a file, or of its first `until` bytes. A line cut short by a kill or a full disk is left out, and
    one that is no record of ours."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if until is not None and file.tell() > until:
                return
            try:
                record = orjson.loads(line)
            except ValueError:
                continue
            if _is_record(record):
                yield record


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and isinstance(value.get("step"), int)
        and (value["kind"] not in ("step", "eval") or "loss" in value)
    )


class MetricsFile:
    """Appends records. Opened at a resumed run's step, it first drops the records of later steps, which will be made
    again."""

    def __init__(self, path: Path, resumed_step: int, may_write: Callable[[], bool] = lambda: True) -> None:
        """`may_write`: false once another start of the run owns its folder."""
        self._path, self._may_write = path, may_write
        self._file = self._open(resumed_step)
        self._lock = threading.Lock()  # system figures come from a thread
        self._refused = False
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # called with every record after it was written

    def _open(self, resumed_step: int) -> TextIO:
        kept = [record for record in read_metrics(self._path) if record["step"] <= resumed_step] if resumed_step else []
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept), durable=False)
        return self._path.open("a", buffering=1, encoding="utf-8")  # by line: what a killed run did is on disk

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: later records are dropped, since those steps will be made again."""
        if not self._may_write():
            return
        with self._lock, suppress(OSError):
            self._file.close()
            self._file = self._open(step)

    def step(self, record: StepRecord) -> None:
        values = {**vars(record), "health": str(record.health)}
        values |= values.pop("of_objective")
        self.write("step", values.pop("step"), values)

    def evaluation(
        self,
        step: int,
        loss: float,
        ppl: float,
        seconds: float,
        figures: Mapping[str, float] | None = None,
        by_position: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """by_position: the loss of tokens by how many come `from` .. `to` before them, and how many `tokens` these
        are."""
        values = {"loss": loss, "ppl": ppl, "seconds": round(seconds, 3), **(figures or {})}
        self.write("eval", step, values | ({"by_position": list(by_position)} if by_position else {}))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record. A disk that refuses it does not stop the run: the listeners still get it."""
        record = {"kind": kind, "step": step, **_plain(values)}
        with self._lock:
            try:
                if not self._file.closed and self._may_write():
                    self._file.write(json.dumps(record) + "\n")
                self._refused = False
            except OSError as error:
                if not self._refused:
                    log.warning("metrics.jsonl could not be written: %s", error)
                self._refused = True
        for listener in self.listeners:
            listener(record)

    def close(self) -> None:
        with self._lock, suppress(OSError):
            self._file.close()
