"""A GPU is hot (NVML)."""

from __future__ import annotations

from lumina.train.health.observations import MachineObservation
from lumina.train.health.rule import Rule


class GpuTemperature(Rule[MachineObservation]):
    observes = MachineObservation
    settings = ("gpu_temperature",)
    hold = False

    def check(self, observed: MachineObservation) -> str | None:
        hot = [gpu for gpu in observed.gpus if gpu.temperature >= self.config.gpu_temperature]
        return f"GPU {hot[0].index} is at {hot[0].temperature:.0f} degrees Celsius" if hot else None


RULE = GpuTemperature
