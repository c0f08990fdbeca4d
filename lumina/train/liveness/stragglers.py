"""Straggler detection: which rank is slower than the others, and on which host.

Under synchronous training the slowest rank sets the pace of all, and the others wait for it inside collectives. So a
step's wall time says nothing; what each rank spends before it meets the others does: its own computing (forward and
backward), and a probe, a fixed piece of arithmetic without any communication. The probe also works under ZeRO-3, whose
forward pass is itself full of collectives. Both are gathered every few steps: one gather of a few numbers a rank.

Ranks have different work where they share rows: the output layer is computed at supervised tokens only, and these are
all in the last part of a row that ends with its answer. So a rank is slow in computing only if it is that for its work
too, beside the ranks that have the same part of other rows.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lumina.train.deepspeed import Ranks

_PROBE = 256  # rows and columns: 34 million operations, a millisecond on one core
_REPEATS = 3


@dataclass
class Comparison:
    """Seconds per step and rank: computing, waiting (update and collectives), and one probe; where each rank runs, and
    its FLOPs per step. sequence: how many neighbouring ranks share each row's tokens."""

    hosts: list[str]
    compute: list[float]
    wait: list[float]
    probe: list[float]
    flops: list[float]
    factor: float
    sequence: int = 1

    def slow(self) -> list[str]:
        """A line for every rank whose computing, also for its FLOPs, or whose probe takes more than `factor` times the
        median: of all ranks, and for its FLOPs of those with the same part of their rows, where there are several."""
        lines = []
        per_flop = [value / max(1.0, flops) for value, flops in zip(self.compute, self.flops, strict=True)]
        compared = (("compute", self.compute, per_flop, self.sequence), ("probe", self.probe, self.probe, 1))
        for name, values, others, parts in compared:
            median = _median(values)
            for rank, value in enumerate(values):
                peers = others[rank % parts :: parts]
                most = self.factor * _median(peers if len(peers) > 1 else others)
                if value > self.factor * median > 0 and others[rank] > most:
                    lines.append(
                        f"rank {rank} on {self.hosts[rank]} is a straggler: {name} takes {value * 1e3:.1f} ms, "
                        f"{value / median:.1f} times the median"
                    )
        return lines

    def record(self) -> dict[str, Any]:
        return {
            "hosts": self.hosts,
            "compute": [round(value, 6) for value in self.compute],
            "wait": [round(value, 6) for value in self.wait],
            "probe": [round(value, 6) for value in self.probe],
            "flops": [round(value) for value in self.flops],
            "slow": self.slow(),
        }


def _median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]  # the lower one: of two ranks, the faster


class Stragglers:
    """Sums this rank's times and compares them with the others' every `interval` steps (0: never)."""

    def __init__(self, ranks: Ranks, interval: int, factor: float) -> None:
        self._interval = interval if ranks.world > 1 else 0
        self._factor = factor
        self._compute = self._wait = self._flops = 0.0
        self._steps = 0
        self._hosts: list[str] = []
        self._world, self._sequence = ranks.world, ranks.sequence

    def add(self, compute: float, wait: float, flops: float) -> None:
        """One step's seconds, and the FLOPs of what this rank computed in it."""
        self._compute += compute
        self._wait += wait
        self._flops += flops
        self._steps += 1

    def due(self, step: int) -> bool:
        """Whether ranks are compared after `step`."""
        return bool(self._interval) and step % self._interval == 0

    def compare(self, step: int) -> Comparison | None:
        """The comparison, when it is due at `step`; collective."""
        if not self.due(step) or not self._steps:
            return None
        if not self._hosts:
            hosts: list[Any] = [None] * self._world
            dist.all_gather_object(hosts, socket.gethostname())
            self._hosts = hosts
        device = "cuda" if torch.cuda.is_available() else "cpu"
        per_step = [total / self._steps for total in (self._compute, self._wait, self._flops)]
        own = torch.tensor([*per_step, probe(device)], device=device)
        every = [torch.empty_like(own) for _ in range(self._world)]
        dist.all_gather(every, own)
        self._compute = self._wait = self._flops = 0.0
        self._steps = 0
        compute, wait, flops, times = torch.stack(every).T.tolist()
        return Comparison(self._hosts, compute, wait, times, flops, self._factor, self._sequence)


def probe(device: str) -> float:
    """Seconds of the best of a few small matrix products: how fast this rank computes at this moment."""
    a = torch.full((_PROBE, _PROBE), 0.5, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        product = a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
        del product
    return best
