"""A device that remembers where the host waited for it: the CPU, with everything counted that would wait on a GPU.

Three recorders. Every value that Python or torch reads out of a tensor (`.item()`, `bool()`, `.tolist()`, `nonzero`, a
boolean index, ...) is seen by modes of torch that are asked before every call and operation, DeepSpeed's included. So
is every tensor made on the device out of host numbers (`torch.tensor(..., device=...)`), which copies from pageable
memory and waits. And DeepSpeed's accelerator is told that the device works asynchronously, with streams and events that
remember being waited for. All events have happened here: DeepSpeed's throttle under ZeRO-3, which waits for the
reduction of two buckets ago to bound its memory, does not show.

Called in a rank's own process (tests/runs): the modes stay for its life.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
OPERATIONS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.nonzero_numpy.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__contains__, torch.Tensor.__array__}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}  # those two only where they name a device


class Recorder:
    """waits: how often the host waited, by step (from 1) and place (`file:line what`)."""

    def __init__(self) -> None:
        self.step: int | None = None  # counted while this is a number
        self.allowed = ""  # the wait that is being made on purpose
        self.waits: Counter[tuple[int, str]] = Counter()
        self._functions, self._operations = _Functions(self), _Operations(self)

    def note(self, what: str) -> None:
        place, line = _place()
        if self.step is not None and not self.allowed and 'device.type == "cpu"' not in line:  # no GPU comes there
            self.waits[self.step, f"{place} {what}"] += 1

    def at(self, step: int) -> dict[str, int]:
        return {place: count for (found, place), count in self.waits.items() if found == step}

    def install(self) -> None:
        """For the rest of this process."""
        _accelerate(self)
        dist.barrier = self._noted(dist.barrier, "barrier")
        self._functions.__enter__()
        self._operations.__enter__()

    def _noted(self, call: Any, what: str) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.note(what)
            return call(*args, **kwargs)

        return noted


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            self._recorder.note(func.__name__)
        elif func in FROM_HOST and (func is torch.Tensor.new_tensor or kwargs.get("device") is not None):
            self._recorder.note("from host numbers")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
        if func in OPERATIONS or (masks and any(i is not None and i.dtype is torch.bool for i in args[1])):
            self._recorder.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _place() -> tuple[str, str]:
    """The innermost line of Lumina or DeepSpeed that the host is at: where it is, and what it says."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.split(".")[0] in ("lumina", "deepspeed", "kernels"):
            path = frame.f_code.co_filename
            return f"{Path(path).name}:{frame.f_lineno}", linecache.getline(path, frame.f_lineno)
        frame = frame.f_back
    return "elsewhere", ""


def _accelerate(recorder: Recorder) -> None:
    """Have DeepSpeed take the CPU for a device that works on its own, with streams and events."""
    from deepspeed.accelerator import get_accelerator

    class Stream:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def synchronize(self) -> None:
            recorder.note("stream.synchronize")

        def wait_stream(self, other: Any) -> None: ...
        def wait_event(self, event: Any) -> None: ...

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, stream: Any = None) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            recorder.note("event.synchronize")

    kind: Any = type(get_accelerator())
    default = Stream()
    kind.is_synchronized_device = kind.resolves_data_dependency = lambda self: False
    kind.handles_memory_backpressure = lambda self: False
    kind.Stream, kind.Event = Stream, Event
    kind.stream = lambda self, stream: nullcontext()
    kind.current_stream = kind.default_stream = lambda self, index=None: default
    kind.synchronize = lambda self, index=None: recorder.note("synchronize")
    for name in ("FloatTensor", "ByteTensor", "LongTensor", "IntTensor", "DoubleTensor"):
        made = getattr(torch, name)
        setattr(kind, name, property(lambda self, made=made: recorder._noted(made, "from host numbers")))
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]
