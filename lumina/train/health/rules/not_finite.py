"""An update was skipped because the gradient was not finite."""

from __future__ import annotations

from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule


class NotFinite(Rule[StepObservation]):
    observes = StepObservation
    settings = ("health_check_interval",)

    def check(self, seen: StepObservation) -> str | None:
        if seen.applied or (seen.refused is not None and seen.refused[0] != "not-finite"):
            return None
        return f"update of step {seen.step} skipped: gradient not finite"


RULE = NotFinite
