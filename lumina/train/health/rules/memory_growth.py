"""Memory grows beyond the level after warm-up, and by 256 MiB."""

from __future__ import annotations

from lumina.config import Config
from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule
from lumina.train.health.statistics import RollingWindow


class MemoryGrowth(Rule[StepObservation]):
    observes = StepObservation
    every_step = True
    settings = ("memory_growth",)
    _SLACK = 256 * 2**20  # a small process's ordinary ups and downs, in bytes

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._recent = RollingWindow(config.health_warmup)
        self._seen = 0
        self._base: float | None = None

    def check(self, observed: StepObservation) -> str | None:
        self._seen += 1
        self._recent.add(observed.memory)
        if self._seen % self.config.health_warmup:  # once per baseline
            return None
        now = self._recent.median()
        if self._base is None:
            if self._seen >= 2 * self.config.health_warmup:  # memory still grows over the first: buffers are being made
                self._base = now
            return None
        if now <= max(self._base * (1 + self.config.memory_growth), self._base + self._SLACK):
            return None
        before, self._base = self._base, now  # growing on, it is reported again at the next such step up
        return f"memory grew from {before / 2**30:.2f} to {now / 2**30:.2f} GiB"


RULE = MemoryGrowth
