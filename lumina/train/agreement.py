"""Agreement between ranks: summed every step, decided by rank 0, or exchanged through the store.

`pack` and `unpack`: what every rank contributes to a step, in one all-reduce of one tensor. The numbers have names, not
positions: the record's fields decide where each one travels, so that a new one cannot shift the others.
`decided_by_rank_0`: a choice that only rank 0 can make, such as one that depends on the disk.
`exchange`: without a collective, through the process group's key-value store, for moments in which some ranks may sit
in a collective or be gone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lumina.checkpoint import RunLock
from lumina.config import UserError
from lumina.train.deepspeed import Ranks
from lumina.train.torch_private import default_store

log = logging.getLogger("lumina")
T = TypeVar("T")


# --- The sum that every step makes ----------------------------------------------------------------


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


# --- What rank 0 decides --------------------------------------------------------------------------


def decided_by_rank_0(ranks: Ranks, choose: Callable[[], T]) -> T:
    """Rank 0's choice, or the UserError that it met, on every rank; collective."""
    found: list[Any] = [None]
    if ranks.main:
        try:
            found = [choose()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    chosen: T = found[0]
    return chosen


def assert_lock_held(ranks: Ranks, lock: RunLock | None) -> None:
    """Raises UserError on every rank when a later start of the run has taken `lock`, which is rank 0's; collective."""
    decided_by_rank_0(ranks, lambda: None if lock is None else lock.assert_held())


# --- Without a collective -------------------------------------------------------------------------


def exchange(key: str, value: dict[str, Any], ranks: Ranks, seconds: float) -> list[dict[str, Any]] | None:
    """Every rank's `value` under `key`, which is used once in a start, without a collective; None when some rank says
    nothing for `seconds`."""
    if ranks.world == 1:
        return [value]
    key = f"{key}/{ranks.start}"
    try:
        group = default_store()
        group.set(f"{key}/{ranks.rank}", json.dumps(value))
        keys = [f"{key}/{other}" for other in range(ranks.world)]
        group.wait(keys, timedelta(seconds=seconds))
        return [json.loads(group.get(name)) for name in keys]
    except Exception as error:  # a rank that is gone, or the store with it
        log.warning("the ranks could not agree: %s", error)
        return None
