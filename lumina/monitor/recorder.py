"""Records of a run beside its steps, on rank 0: run.json, system metrics, sample answers, and the trackers' feeds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumina.config import Config
from lumina.monitor import run_json
from lumina.monitor.events import Event
from lumina.monitor.metrics import MetricsFile
from lumina.monitor.system import Sampler
from lumina.monitor.tracking import RunInfo, Trackers

log = logging.getLogger("lumina")


class Recorder:
    """Opened with the run's folder, closed with the run. Nothing it does stops a run."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        metrics: MetricsFile,
        fingerprint: str,
        may_write: Callable[[], bool] = lambda: True,
        **facts: Any,
    ) -> None:
        """`facts` go into this start's entry of run.json; among them `step`, which the run goes on from. `may_write`:
        false once another start of the run owns its folder."""
        self._may_write = may_write
        self._folder, self._metrics, self._step = folder, metrics, int(facts["step"])
        try:
            run_json.add_start(folder, config.values(), fingerprint, **facts)
        except OSError as error:
            log.warning("run.json could not be written: %s", error)
        self._trackers = Trackers(config.trackers, RunInfo(folder, config.experiment_name, config.values(), self._step))
        metrics.listeners.append(self._heard)
        every = config.system_metrics_seconds
        self._sampler = Sampler(folder, every, self._measured) if every else None

    def _heard(self, record: Mapping[str, Any]) -> None:
        self._step = record["step"]
        self._track(record)

    def _track(self, record: Mapping[str, Any]) -> None:
        if self._may_write():
            self._trackers.record(record)

    def _measured(self, values: dict[str, Any]) -> None:
        self._metrics.write("system", self._step, values)

    def event(self, event: Event) -> None:
        """Show the trackers an event of the run's events.jsonl."""
        text = f"{event.level} {event.rule}: {event.reason}" + (f" -> {event.action}" if event.action else "")
        self._track({"kind": "event", "step": event.step, "name": "events", "text": text})

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        """Keep (prompt, answer) pairs of an evaluation in samples.jsonl."""
        record = {"step": step, "answers": [{"prompt": prompt, "answer": answer} for prompt, answer in answers]}
        try:
            if self._may_write():
                with (self._folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            log.warning("samples.jsonl could not be written: %s", error)
        for number, (prompt, answer) in enumerate(answers):
            text = f"**{prompt}**\n\n{answer}"
            self._track({"kind": "sample", "step": step, "name": f"samples/{number}", "text": text})

    def rewind(self, step: int) -> None:
        """The run goes back to `step`."""
        if self._may_write():
            self._trackers.rewind(step)

    def close(self, state: str, step: int, reason: str = "") -> None:
        """`state` is finished, stopped or failed."""
        if self._sampler is not None:
            self._sampler.close()
        try:
            if self._may_write():
                run_json.add_end(self._folder, state, step, reason)
        except OSError as error:
            log.warning("run.json could not be written: %s", error)
        if self._may_write():
            self._trackers.close()
        else:  # what they write at their end may be the other start's by now
            self._trackers.abandon()
