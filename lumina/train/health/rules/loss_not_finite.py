"""The loss is NaN or infinite."""

from __future__ import annotations

import math

from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule


class LossNotFinite(Rule[StepObservation]):
    observes = StepObservation
    level, hold = "crit", False

    def check(self, observed: StepObservation) -> str | None:
        return None if math.isfinite(observed.loss) else "loss is not finite"


RULE = LossNotFinite
