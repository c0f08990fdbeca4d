"""Inputs of recomputed layers in the host's memory, from their forward to their backward pass.

On a GPU copies run on a stream of their own, into pinned memory, beside the computation. Three things keep them right:
a tensor's memory is not given to another before its copy is done (`record_stream`); the host's buffers are written and
read by that one stream, in its order, so that one may be taken again as soon as its reading is begun; and the
computation waits for an event before it uses what came back. While a layer is computed again, the input of the one
before it is on its way. At most two copies to the host are under way: then the computation waits, since what is not
copied yet is still on the device. On a CPU the same code makes plain copies.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

#: Copies to the host that may be under way.
UNDER_WAY = 2


class _Copy:
    """One tensor in the host's memory. found: the same on its device again, once it has been asked for."""

    def __init__(self, tensor: Tensor, buffer: Tensor, before: weakref.ref[_Copy] | None) -> None:
        self.shape, self.device = tensor.shape, tensor.device
        self.buffer: Tensor | None = buffer
        self.before = before  # the copy made before this one, whose turn is next in the backward pass
        self.found: Tensor | None = None
        self.ready: torch.cuda.Event | None = None

    def view(self) -> Tensor:
        assert self.buffer is not None
        return self.buffer[: self.shape.numel()].view(self.shape)


class HostCopies:
    """Where recomputed layers' inputs wait. One for a model: its buffers are used again from step to step."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._newest: weakref.ref[_Copy] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._under_way: deque[torch.cuda.Event] = deque()

    def saved(self) -> saved_tensors_hooks:
        """In its `with` block, what autograd saves is kept here. A graph may be run backward once."""
        return saved_tensors_hooks(self._to_host, self._to_device)

    def _to_host(self, tensor: Tensor) -> _Copy:
        copy = _Copy(tensor, self._buffer(tensor), self._newest)
        self._newest = weakref.ref(copy)
        side = self._side_stream(tensor.device)
        if side is None:
            copy.view().copy_(tensor)
            return copy
        current = torch.cuda.current_stream(tensor.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            copy.view().copy_(tensor, non_blocking=True)
            self._under_way.append(side.record_event())
        tensor.record_stream(side)
        if len(self._under_way) > UNDER_WAY:
            current.wait_event(self._under_way.popleft())
        return copy

    def _to_device(self, copy: _Copy) -> Tensor:
        self._fetch(copy)
        found, before = copy.found, copy.before() if copy.before is not None else None
        assert found is not None
        copy.found = copy.before = None
        if copy.ready is not None:
            current = torch.cuda.current_stream(copy.device)
            current.wait_event(copy.ready)
            found.record_stream(current)
            if before is not None and before.buffer is not None:
                self._fetch(before)
        return found

    def _fetch(self, copy: _Copy) -> None:
        """Begin to copy it back, if that has not been begun, and give up its buffer."""
        if copy.found is not None:
            return
        assert copy.buffer is not None, "a graph over copied inputs runs backward once"
        side = self._side_stream(copy.device)
        on_side: AbstractContextManager[Any] = nullcontext() if side is None else torch.cuda.stream(side)
        with on_side:
            copy.found = torch.empty(copy.shape, dtype=copy.buffer.dtype, device=copy.device)
            copy.found.copy_(copy.view(), non_blocking=True)
            copy.ready = None if side is None else side.record_event()
        self._free.append(copy.buffer)
        copy.buffer = None

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream

    def _buffer(self, tensor: Tensor) -> Tensor:
        """Host memory for the tensor, pinned for a GPU's. Rows differ in length from step to step: a buffer holds a
        power of two of numbers, which is what torch's allocator of pinned memory rounds to in any case."""
        count = tensor.numel()
        fitting = [b for b in self._free if b.numel() >= count and b.dtype is tensor.dtype]
        if fitting:
            smallest = min(fitting, key=Tensor.numel)
            self._free = [b for b in self._free if b is not smallest]
            return smallest
        if self._free:  # too small, or of another type
            self._free.pop(0)
        on_gpu = tensor.device.type == "cuda"
        return torch.empty(1 << max(count - 1, 0).bit_length(), dtype=tensor.dtype, pin_memory=on_gpu)
