"""The gradient norm is next to nothing for 8 steps."""

from __future__ import annotations

import math

from lumina.config import Config
from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule
from lumina.train.health.statistics import RollingWindow


class GradVanishing(Rule[StepObservation]):
    observes = StepObservation
    settings = ("grad_vanishing_factor",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._norms = RollingWindow(config.health_window)
        self._row = 0

    def check(self, observed: StepObservation) -> str | None:
        if not math.isfinite(observed.grad_norm):
            return None
        if len(self._norms) < self.config.health_warmup:
            self._norms.add(observed.grad_norm)
            return None
        middle = self._norms.median()
        if observed.grad_norm > self.config.grad_vanishing_factor * middle:
            self._row = 0
            self._norms.add(observed.grad_norm)
            return None
        self._row += 1
        return f"gradient norm {observed.grad_norm:.3g}, median {middle:.3g}" if self._row >= 8 else None


RULE = GradVanishing
