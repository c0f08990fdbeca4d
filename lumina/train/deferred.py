"""A step's numbers (loss, gradient norm, flags of all ranks), read while the next step is computed.

Reading a number from a GPU waits for everything that was queued before it. A loop that reads each step's loss at the
step's end so lets the device run dry, and queues the next step's first kernels while it idles. Here a step leaves its
numbers on their way to the host (`Deferred.put`), and they are read (`Deferred.settle`) in the next step, between its
backward passes and its update: all of its forward and backward passes are queued by then, so the device does not wait
for the host.

What the numbers decide is decided there, before the next update: weights, moments and progress are still those of the
step that the numbers belong to. So nothing but the clock tells the difference: a run stops, saves and goes back at the
same steps, with the same baselines, as one that reads each step's numbers at once, at the price of one step's forward
and backward passes that are thrown away when it stops or goes back. Before an evaluation, a save or the end of the run
the numbers are read at once, since these wait for the device anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumina.data import StepData, samples_id
from lumina.train.deepspeed.engine import scale_exhausted
from lumina.train.outputs.step_record import record_step

if TYPE_CHECKING:
    from lumina.train.deepspeed.timing import PhaseTimes
    from lumina.train.run import Run


def send(values: list[float], device: torch.device) -> Tensor:
    """A float64 tensor of host numbers on the device, without waiting for it: from pinned memory."""
    host = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


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
    """A step whose numbers are under way: norm, applied, loss scale, whether that is exhausted, and what `put` is
    given. times: of its phases; ended: seconds since 1970."""

    data: StepData
    lr: float
    numbers: Readback
    times: PhaseTimes
    ended: float


class Deferred:
    """The one step whose numbers have not been read yet, if there is one. One per run and rank; every rank settles at
    the same places, so that what follows may be collective."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._taken: StepTaken | None = None

    @property
    def pending(self) -> bool:
        return self._taken is not None

    def put(self, data: StepData, lr: float, shared: Tensor, norm: Tensor, applied: Tensor) -> None:
        """After a step's update. shared: float64, the mean loss, the flags and the sums of all ranks, as the loop makes
        them; norm and applied: 0-dimensional, all on the device."""
        assert self._taken is None, "the step before was not settled"
        engine = self._run.engine
        scale = engine.gradient_scale()  # fp16's under stage 0 is on the device
        if not isinstance(scale, Tensor):
            scale = torch.full_like(norm, scale)
        exhausted = engine.exhausted()
        if exhausted is None:
            exhausted = torch.zeros_like(applied)
        own = torch.stack((norm.double(), applied.double(), scale.double(), exhausted.double()))
        times = engine.timer.lap()  # before the numbers: once they are there, the device has come past its last event
        self._taken = StepTaken(data, lr, Readback(torch.cat((own, shared))), times, time.time())

    def settle(self, rebuild: Callable[[], None] = lambda: None) -> str | None:
        """Read the step's numbers and act upon them. Returns why the run must stop, if it must, agreed between all
        ranks. Raises Rewind when the state was set back. `rebuild` is called between the two."""
        run, taken = self._run, self._taken
        if taken is None:
            rebuild()
            return None
        self._taken = None
        numbers = taken.numbers.read()
        stopping, resizing, busy, asked, backup, corrupt = numbers[5:11]
        run.saves.agree(busy, asked, backup)
        if corrupt:
            run.answers.note_corrupt(taken.data)
        self._note(taken, numbers)
        rebuild()
        run.answers.go_back_if_due()
        if stopping:
            return f"signal {run.stop.signal or 'on another rank'}"
        return "resize" if resizing else None

    def note(self, wait: bool) -> None:
        """After an exception: what is known of the step is recorded, and nothing else is done. Not collective. With
        `wait` false only if the numbers are there: the device may never come to them."""
        taken, self._taken = self._taken, None
        if taken is not None and (wait or taken.numbers.ready()):
            self._note(taken, taken.numbers.read())

    def _note(self, taken: StepTaken, numbers: list[float]) -> None:
        """The step's record, its health, and its place in the baselines or among the refused ones."""
        run, split, sums = self._run, taken.times.read(), numbers[11:]
        norm, made, scale, exhausted, loss = numbers[:5]
        applied, loss_scale = bool(made), scale if run.engine.fp16 else None
        run.stragglers.add(split["forward"] + split["backward"], split["communication"] + split["optimizer"])
        anomaly = run.answers.judge(loss, norm)
        data, samples = taken.data, samples_id(*sums)
        try:
            record_step(run, data, loss, taken.lr, norm, applied, anomaly, split, samples, taken.ended, loss_scale)
        finally:  # the update was made, whatever became of its record: a checkpoint's baselines know of it
            run.answers.after_update(data, loss, norm, applied, anomaly)
        if exhausted:
            raise scale_exhausted(f"step {data.step + 1}: ")
