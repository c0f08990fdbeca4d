"""A layer gets no gradient in two measurements in a row."""

from __future__ import annotations

from lumina.config import Config
from lumina.train.health.observations import LayerObservation
from lumina.train.health.rule import Rule
from lumina.train.health.rules._text import others
from lumina.train.health.statistics import median


class LayerDead(Rule[LayerObservation]):
    observes = LayerObservation
    settings = ("layer_dead_fraction", "layer_stats_every")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._suspects: set[str] = set()

    def check(self, observed: LayerObservation) -> str | None:
        limit = self.config.layer_dead_fraction * median(f.gradient for f in observed.layers.values())
        low = {name for name, figures in observed.layers.items() if figures.gradient <= limit}
        dead, self._suspects = sorted(low & self._suspects), low
        return f"{dead[0]} gets no gradient" + others(dead) if dead else None


RULE = LayerDead
