"""The loss scale of fp16 has collapsed."""

from __future__ import annotations

from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule


class LossScaleCollapse(Rule[StepObservation]):
    observes = StepObservation
    settings = ("loss_scale_floor",)
    level = "crit"

    def check(self, observed: StepObservation) -> str | None:
        if observed.loss_scale is None or observed.loss_scale >= self.config.loss_scale_floor:
            return None
        return f"fp16 loss scale {observed.loss_scale:g}: gradients underflow or are never finite"


RULE = LossScaleCollapse
