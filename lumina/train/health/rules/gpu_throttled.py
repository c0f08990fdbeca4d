"""A GPU's clocks are held down by heat or power (NVML)."""

from __future__ import annotations

from lumina.train.health.observations import MachineObservation
from lumina.train.health.rule import Rule


class GpuThrottled(Rule[MachineObservation]):
    observes = MachineObservation
    hold = False

    def check(self, observed: MachineObservation) -> str | None:
        slow = [gpu for gpu in observed.gpus if gpu.throttled]
        return f"GPU {slow[0].index} is slowed down: {slow[0].throttled}" if slow else None


RULE = GpuThrottled
