"""Deferred readback: a step's numbers (loss, gradient norm, what the ranks agree on) are read during the next step.

Reading a number from a GPU waits for everything that was queued before it. A loop that reads each step's loss at the
step's end so lets the device run dry, and queues the next step's first kernels while it idles. Here a step leaves its
numbers on their way to the host (`Deferred.put`), and they are read in the next step, between its backward passes and
its update: all of its forward and backward passes are queued by then, so the device does not wait for the host.

What the numbers decide is decided there, before the next update: weights, moments and progress are still those of the
step that the numbers belong to. So nothing but the clock tells the difference: a run stops, saves and goes back at the
same steps, with the same baselines, as one that reads each step's numbers at once, at the price of one step's forward
and backward passes that are thrown away when it stops or goes back. Before an evaluation, a save or the end of the run
the numbers are read at once, since these wait for the device anyway.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lumina.data import StepData
from lumina.model import ExpertBalance
from lumina.train.agreement import StepSums, pack, unpack
from lumina.train.deepspeed import Engine, PhaseTimes
from lumina.train.health import LayerFigures


@dataclass(frozen=True)
class UpdateNumbers:
    """What an update tells, the same on every rank. norm: of the gradient before clipping; applied: whether the update
    was made; scale: fp16's loss scale, 1 elsewhere; exhausted: whether that is at its smallest and overflowed. Tensors
    on the device when they are sent, numbers when they are read."""

    norm: Any
    applied: Any
    scale: Any
    exhausted: Any


class Readback:
    """Numbers on their way from the device to the host."""

    def __init__(self, values: Tensor) -> None:
        """`values`: float64 [n]; not to be changed afterwards."""
        self._host = values
        self._there: Any = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record()

    def ready(self) -> bool:
        """Whether reading would not wait."""
        return self._there is None or bool(self._there.query())

    def read(self) -> list[float]:
        """The numbers, once the device has computed them: THE wait of a step."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


@dataclass
class StepTaken:
    """A step whose numbers are under way. times: of its phases; ended: seconds since 1970; figures: how many the
    objective has; layers: figures of each layer, at the steps that are due for them; memory: bytes in use on the rank
    that has the most, memory_total: bytes that it has, and experts: how evenly the tokens went to them, once they
    are read."""

    data: StepData
    lr: float
    numbers: Readback
    times: PhaseTimes
    ended: float
    figures: int = 0
    layers: dict[str, LayerFigures] | None = None
    memory: int = 0
    memory_total: int = 0
    has_experts: bool = False
    experts: ExpertBalance | None = None

    def read(self) -> tuple[UpdateNumbers, StepSums, list[float]]:
        """What the update tells, what the ranks added up, and the means of the objective's figures. Waits for the
        device. Fills in both of `memory`, and `experts` where the model has any."""
        numbers, own = self.numbers.read(), len(fields(UpdateNumbers))
        end = own + len(fields(StepSums))
        if self.has_experts:
            balance = len(fields(ExpertBalance))
            numbers, self.experts = numbers[:-balance], unpack(ExpertBalance, numbers[-balance:])
        means, memory = numbers[end : end + self.figures], numbers[end + self.figures :]
        pairs = zip(memory[::2], memory[1::2], strict=True)
        self.memory, self.memory_total = map(int, max(pairs, default=(0, 0)))
        return unpack(UpdateNumbers, numbers[:own]), unpack(StepSums, numbers[own:end]), means


class Deferred:
    """The one step whose numbers have not been read yet, if there is one. One per run and rank; every rank reads at the
    same places, so that what follows may be collective."""

    def __init__(self) -> None:
        self._taken: StepTaken | None = None

    @property
    def pending(self) -> bool:
        return self._taken is not None

    def put(
        self,
        engine: Engine,
        data: StepData,
        lr: float,
        sums: Tensor,
        norm: Tensor,
        applied: Tensor,
        experts: Tensor | None = None,
    ) -> None:
        """After a step's update. sums: the `StepSums` of all ranks, packed, after them the objective's figures, and the
        bytes in use and the bytes there are of each rank; norm and applied: 0-dimensional; experts:
        lumina.model.expert_balance of all ranks; all on the device."""
        assert self._taken is None, "the numbers of the step before were not read"
        scale = engine.gradient_scale()  # fp16's under stage 0 is on the device
        if not isinstance(scale, Tensor):
            scale = torch.full_like(norm, scale)
        exhausted = engine.exhausted()
        if exhausted is None:
            exhausted = torch.zeros_like(applied)
        own = pack(UpdateNumbers(norm, applied, scale, exhausted), norm.device)
        numbers = (own, sums) if experts is None else (own, sums, experts)
        times = engine.timer.lap()  # before the numbers: once they are there, the device has come past its last event
        self._taken = StepTaken(data, lr, Readback(torch.cat(numbers)), times, time.time(), len(engine.figures))
        self._taken.has_experts = experts is not None

    def keep_layers(self, figures: dict[str, LayerFigures]) -> None:
        """The layers' figures of the step whose numbers are under way."""
        if self._taken is not None:
            self._taken.layers = figures

    def take(self) -> StepTaken | None:
        """The step, to be read now; whatever comes of that, it is not pending any more."""
        taken, self._taken = self._taken, None
        return taken
