"""Tokens/s are far below their median for 16 steps."""

from __future__ import annotations

from lumina.config import Config
from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule
from lumina.train.health.statistics import RollingWindow


class ThroughputFall(Rule[StepObservation]):
    observes = StepObservation
    every_step = True
    settings = ("throughput_fall",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._speeds = RollingWindow(config.health_window)
        self._row = 0

    def check(self, observed: StepObservation) -> str | None:
        middle = self._speeds.median() if len(self._speeds) >= self.config.health_warmup else 0.0
        if not observed.tokens_per_s < self.config.throughput_fall * middle:
            self._row = 0
            self._speeds.add(observed.tokens_per_s)
            return None
        self._row += 1
        return f"{observed.tokens_per_s:.0f} tokens/s, median {middle:.0f}" if self._row >= 16 else None


RULE = ThroughputFall
