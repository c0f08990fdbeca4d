"""Fp16's loss scale has collapsed."""

from __future__ import annotations

from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule


class LossScaleCollapse(Rule[StepObservation]):
    observes = StepObservation
    settings = ("loss_scale_floor",)
    level = "crit"

    def check(self, seen: StepObservation) -> str | None:
        if seen.loss_scale is None or seen.loss_scale >= self.config.loss_scale_floor:
            return None
        return f"fp16 loss scale {seen.loss_scale:g}: gradients underflow or are never finite"


RULE = LossScaleCollapse
