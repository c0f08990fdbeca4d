"""metrics.jsonl: one JSON object per line, a line per step and per evaluation, never a step twice.

Values that are not finite are written as null, which every JSON reader takes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lumina.monitor.record import StepRecord


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; a last line cut short by a kill is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


class MetricsFile:
    """Appends records. Opened at a resumed run's step, it first drops the records of later steps, which will be made
    again."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= resumed_step] if resumed_step else []
        scratch = path.with_name(f".{path.name}.partial")
        with scratch.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        os.replace(scratch, path)
        self._file = path.open("a", buffering=1)  # by line: what a killed run did is on disk

    def step(self, record: StepRecord) -> None:
        values = {key: _plain(value) for key, value in asdict(record).items()}
        self._file.write(json.dumps({"kind": "step", **values}) + "\n")

    def evaluation(self, step: int, loss: float, ppl: float, seconds: float) -> None:
        values = {"step": step, "loss": _plain(loss), "ppl": _plain(ppl), "seconds": round(seconds, 3)}
        self._file.write(json.dumps({"kind": "eval", **values}) + "\n")

    def close(self) -> None:
        self._file.close()
