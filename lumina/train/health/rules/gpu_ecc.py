"""New uncorrected memory errors on a GPU since the start (NVML)."""

from __future__ import annotations

from lumina.config import Config
from lumina.train.health.observations import MachineObservation
from lumina.train.health.rule import Rule


class GpuEcc(Rule[MachineObservation]):
    observes = MachineObservation
    level = "crit"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._known: dict[int, int] = {}

    def check(self, observed: MachineObservation) -> str | None:
        """New errors only: those from before the run are in the first observation."""
        found = None
        for gpu in observed.gpus:
            known = self._known.setdefault(gpu.index, gpu.ecc_errors)
            if gpu.ecc_errors > known:
                found = found or f"GPU {gpu.index} has {gpu.ecc_errors - known} uncorrected memory errors"
        return found


RULE = GpuEcc
