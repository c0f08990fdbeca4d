"""Little room is left for checkpoints or backups."""

from __future__ import annotations

from lumina.train.health.observations import MachineObservation
from lumina.train.health.rule import Rule


class DiskFull(Rule[MachineObservation]):
    observes = MachineObservation
    settings = ("disk_free_checkpoints",)
    hold = False

    def check(self, observed: MachineObservation) -> str | None:
        needed = self.config.disk_free_checkpoints * observed.checkpoint_bytes
        short = [(free, folder) for folder, free in observed.free.items() if free < needed]
        if not short:
            return None
        free, folder = min(short)
        return (
            f"{free / 2**30:.2f} GiB free at {folder}, a checkpoint takes {observed.checkpoint_bytes / 2**30:.2f} GiB"
        )


RULE = DiskFull
