"""Snapshot: a copy in host memory of what one rank adds to a checkpoint, written while the training goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Snapshot:
    """A copy in host memory of what this rank owns at one step, and what trainer.json will say. Each tensor is a list
    of flat chunks. It is there, and trainer.json complete, after `wait`."""

    step: int
    tensors: dict[str, list[torch.Tensor]]
    ranges: dict[str, list[int]]
    trainer: dict[str, Any] = field(default_factory=dict)
    copied: Any = None  # the event behind the copies; None: they are there
    counter: torch.Tensor | None = None  # the optimizer's step count, copied too
    sources: list[torch.Tensor] = field(default_factory=list)  # whose memory must not be freed before

    @property
    def bytes(self) -> int:
        return sum(chunk.numel() * chunk.element_size() for chunks in self.tensors.values() for chunk in chunks)

    def wait(self) -> None:
        """Wait on the host until the copies are there."""
        if self.copied is not None:
            self.copied.synchronize()
        self.sources.clear()
        if self.counter is not None:
            self.trainer["optimizer_step"] = int(self.counter[0])

    def finite(self) -> bool:
        """Whether every number of it is."""
        self.wait()
        floats = (chunk for chunks in self.tensors.values() for chunk in chunks if chunk.is_floating_point())
        return all(bool(torch.isfinite(chunk).all()) for chunk in floats)
