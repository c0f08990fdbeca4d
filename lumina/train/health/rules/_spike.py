"""The rules whose anomalies the spike detector finds."""

from __future__ import annotations

from typing import ClassVar

from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule


class SpikeRule(Rule[StepObservation]):
    """A rule whose anomalies the spike detector finds before the update; `anomaly` is the detector's name for it."""

    observes = StepObservation
    anomaly: ClassVar[str]

    def check(self, observed: StepObservation) -> str | None:
        return (
            f"step {observed.step}: {observed.anomaly[1]}"
            if observed.anomaly and observed.anomaly[0] == self.anomaly
            else None
        )
