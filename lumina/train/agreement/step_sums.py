"""The sum that every step makes: what each rank contributes, in one all-reduce of one tensor.

The numbers have names, not positions: the record's fields decide where each one travels, so that a new one cannot shift
the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class StepSums:
    """What all ranks add up at every step. Each field is the sum over the ranks of what one rank gives; a field is
    added here and nowhere else."""

    loss: Any  # this rank's part of the mean loss: float64, 0-dimensional, on the device
    stop: float = 0.0  # asked by a signal to save and end
    resize: float = 0.0  # asked to save and end, to be started again at another world size
    writing: float = 0.0  # the writer of the save before is still busy
    checkpoint: float = 0.0  # a checkpoint is asked for, by a user or a retry
    backup: float = 0.0  # a backup is asked for
    corrupt: float = 0.0  # samples that could not be read
    lock_lost: float = 0.0  # a later start of the run has taken its lock
    callback_stop: float = 0.0  # a callback asks to stop
    callback_failed: float = 0.0  # a callback raised an exception
    sample_count: float = 0.0  # lumina.data.loading.order.sample_sums of this rank's samples
    sample_high: float = 0.0
    sample_low: float = 0.0
    flops: float = 0.0  # of what was computed for the step

    @property
    def samples(self) -> tuple[float, float, float]:
        """For lumina.data.loading.order.samples_id."""
        return self.sample_count, self.sample_high, self.sample_low


def send(values: Sequence[float], device: torch.device) -> Tensor:
    """A float64 tensor [n] of host numbers on the device, without waiting for it: from pinned memory."""
    host = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def pack(record: Any, device: torch.device) -> Tensor:
    """A record's fields as one float64 tensor [fields] on `device`; each is a host number or a 0-dimensional tensor
    that is there already. Nothing waits for the device."""
    values = [getattr(record, field.name) for field in fields(record)]
    parts = []
    for on_device, run in groupby(values, key=lambda value: isinstance(value, Tensor)):
        given = list(run)
        parts.append(torch.stack([one.double() for one in given]) if on_device else send(given, device))
    return torch.cat(parts)


def entry(kind: type[Any], packed: Tensor, name: str) -> Tensor:
    """One field of a packed record, where it is: 0-dimensional, on the device."""
    return packed[[field.name for field in fields(kind)].index(name)]


def unpack(kind: type[T], numbers: Sequence[float]) -> T:
    """The record of this kind whose `pack` the numbers are."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    return kind(**dict(zip(names, numbers, strict=True)))
