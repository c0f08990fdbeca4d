"""An update was skipped because the gradient was not finite."""

from __future__ import annotations

from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule


class NotFinite(Rule[StepObservation]):
    observes = StepObservation
    settings = ("health_check_interval",)

    def check(self, observed: StepObservation) -> str | None:
        if observed.applied or (observed.anomaly is not None and observed.anomaly[0] != "not-finite"):
            return None
        return f"update of step {observed.step} skipped: gradient not finite"


RULE = NotFinite
