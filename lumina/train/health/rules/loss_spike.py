"""The loss is far above its baseline."""

from __future__ import annotations

from lumina.train.health.rules._spike import SpikeRule


class LossSpike(SpikeRule):
    anomaly = "loss-spike"
    settings = ("spike_deviations", "health_window", "health_warmup")


RULE = LossSpike
