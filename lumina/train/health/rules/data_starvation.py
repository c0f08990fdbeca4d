"""A good part of the time is spent waiting for data."""

from __future__ import annotations

from lumina.config import Config
from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule
from lumina.train.health.statistics import RollingWindow


class DataStarvation(Rule[StepObservation]):
    observes = StepObservation
    every_step = True
    settings = ("data_wait_fraction",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._shares = RollingWindow(config.health_window)

    def check(self, observed: StepObservation) -> str | None:
        self._shares.add(observed.wait / observed.seconds)
        share = self._shares.median()
        if len(self._shares) < self.config.health_warmup or share <= self.config.data_wait_fraction:
            return None
        return f"{share:.0%} of a step is spent waiting for data"


RULE = DataStarvation
