"""A layer's update is large beside its weights, or its gradient beside its own median."""

from __future__ import annotations

import math

from lumina.config import Config
from lumina.train.health.observations import LayerObservation
from lumina.train.health.rule import Rule
from lumina.train.health.rules._text import others
from lumina.train.health.statistics import RollingWindow


class LayerExploding(Rule[LayerObservation]):
    observes = LayerObservation
    settings = ("layer_update_ratio", "layer_gradient_factor", "layer_stats_every")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._gradients: dict[str, RollingWindow] = {}

    def check(self, observed: LayerObservation) -> str | None:
        found = []
        for name, figures in observed.layers.items():
            baseline = self._gradients.setdefault(name, RollingWindow(32))
            limit = self.config.layer_gradient_factor * baseline.median() if len(baseline) >= 4 else math.inf
            if figures.update_ratio > self.config.layer_update_ratio:
                found.append(f"{name}'s update is {figures.update_ratio:.2g} times its weights")
            elif figures.gradient > limit:
                found.append(f"{name}'s gradient norm is {figures.gradient:.3g}, median {baseline.median():.3g}")
            else:
                baseline.add(figures.gradient)
        return found[0] + others(found) if found else None


RULE = LayerExploding
