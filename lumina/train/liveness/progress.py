"""Progress within a step: marks that its passes leave behind them, at each layer and at each exchange of attention.

A step over rows of millions of tokens takes hours, and a layer of it minutes: what tells a long step from a hang is
whether the next layer comes. On a CPU a mark is there when the pass is. On a GPU the host is ahead, by a whole step
even, and sits in the one read of a step until the device is done: there a mark is a CUDA event, which the watchdog's
thread asks whether it is done. Nobody waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the watchdog's processes in tests need no torch
    from torch import Tensor

    from lumina.train.deepspeed import Engine


class Progress:
    """How far this rank's passes have come. Marks are made by the threads that compute, and looked at by one other.

    record: makes an event behind what is queued now, whose `query` says whether the device has come past it, or None
    where there can be none; None is the device's own way."""

    def __init__(self, record: Callable[[], Any] | None = None) -> None:
        self._record = record
        self._on_device: Callable[[], None] | None = None  # makes the engine's device that of the calling thread
        self._queued: deque[tuple[Any, str]] = deque()  # what the device may not have come past yet
        self._passed = (0.0, "")  # when (time.monotonic()), and what

    def follow(self, engine: Engine) -> None:
        """From now on the passes of this engine leave their marks."""
        if self._record is None and engine.device.type == "cuda":
            import torch

            self._record, self._on_device = _event, partial(torch.cuda.set_device, engine.device)
        model, mark = engine.model, self.mark
        names = [*(f"layer {layer}" for layer in range(len(model.blocks))), "the output layer"]
        forward = [f"the forward pass of {name}" for name in names]
        above = [partial(_mark, mark, f"the backward pass of {name}") for name in names[1:]]

        def at_layer(layer: int, out_BSD: Tensor) -> None:
            mark(forward[layer])
            if out_BSD.requires_grad:  # its gradient is there when what is above it is done
                out_BSD.register_hook(above[layer])  # type: ignore[no-untyped-call]

        model.at_layer = at_layer
        if model.sequence is not None:
            model.sequence.exchanging = partial(_exchanging, engine.timer.exchanging, mark)

    def mark(self, what: str) -> None:
        """`what` is done when all is that is queued now."""
        if self._record is None:
            self._passed = time.monotonic(), what
            return
        event = self._record()
        if event is not None:
            self._queued.append((event, what))

    def newest(self) -> tuple[float, str]:
        """When the newest mark was passed, or found to be so, and what it stands for. For one thread."""
        try:
            # A new thread's current device is the machine's first, where a query begins a context of some 500 MB, for
            # every rank. No test holds this: without a second GPU there is nothing to see.
            if self._queued and self._on_device is not None:
                self._on_device()
            while self._queued and self._queued[0][0].query():
                self._passed = time.monotonic(), self._queued.popleft()[1]
        except RuntimeError:  # of a kernel that failed: the thread that computes hears of it
            self._queued.clear()
        return self._passed


def _mark(mark: Callable[[str], None], what: str, gradient: Tensor) -> None:
    mark(what)


@contextmanager
def _exchanging(timed: Callable[[int], Any], mark: Callable[[str], None], sent: int) -> Iterator[None]:
    with timed(sent):
        yield
    mark("an exchange between the ranks that share rows")


def _event() -> Any:
    """Behind what is queued on the current stream; None while that is captured in a graph, which would keep it."""
    import torch

    if torch.cuda.is_current_stream_capturing():
        return None
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
