"""The gradient norm is far above its median and its spread."""

from __future__ import annotations

from lumina.train.health.rules._spike import SpikeRule


class GradExplosion(SpikeRule):
    anomaly = "grad-explosion"
    settings = ("grad_explosion_factor", "spike_deviations")


RULE = GradExplosion
