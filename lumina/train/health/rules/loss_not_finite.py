"""The loss is NaN or infinite."""

from __future__ import annotations

import math

from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule


class LossNotFinite(Rule[StepObservation]):
    observes = StepObservation
    level, hold = "crit", False

    def check(self, seen: StepObservation) -> str | None:
        return None if math.isfinite(seen.loss) else "loss is not finite"


RULE = LossNotFinite
