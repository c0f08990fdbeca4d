"""The median loss does not fall any more."""

from __future__ import annotations

import math
from collections import deque

from lumina.config import Config
from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule
from lumina.train.health.statistics import median


class Plateau(Rule[StepObservation]):
    observes = StepObservation
    settings = ("plateau_steps", "plateau_gain")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._losses: deque[float] = deque(maxlen=config.plateau_steps)
        self._reason: str | None = None

    def check(self, observed: StepObservation) -> str | None:
        self._losses.append(observed.loss)
        size = self.config.plateau_steps
        if len(self._losses) < size:
            return None
        if observed.step % max(1, size // 20) == 0:  # two sorts of thousands of values: now and then
            values = [loss for loss in self._losses if math.isfinite(loss)]
            before, after = median(values[: len(values) // 2]), median(values[len(values) // 2 :])
            gain = (before - after) / abs(before) if before else 0.0
            flat = gain < self.config.plateau_gain
            self._reason = f"the loss fell by {gain:.2%} in {size // 2} steps" if flat else None
        return self._reason


RULE = Plateau
