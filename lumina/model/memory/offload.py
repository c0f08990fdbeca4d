"""Inputs of recomputed layers in the host's memory, from their forward to their backward pass.

On a GPU copies run on a stream of their own, into pinned memory, beside the computation. Three things keep them right:
every tensor on the device is the computation's stream's own and is held until that stream waits for the copy's event,
so that whatever takes its memory next comes after the copy; a copy begins when the stream has done what was queued
before it, which may still use the memory that the copy writes; and the host's buffers are written and read by the
copies' stream alone, in its order, so that one may be taken again as soon as its reading is begun. All of these waits
are the device's: the host may queue a whole pass ahead, and the device holds no more for it. (After `record_stream` it
would: a block is free again only when the host finds its event done.)

While a layer is computed again, the input of the one before it is on its way. At most two copies to the host are under
way: then the computation waits, since what is not copied yet is still on the device. On a CPU the same code makes plain
copies.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lumina.config import UserError

#: Copies to the host that may be under way.
UNDER_WAY = 2

#: CUDA's number for memory that cannot be had (cudaErrorMemoryAllocation).
_NO_MEMORY = 2


class _Copy:
    """One tensor in the host's memory. found: the same on its device again, once it has been asked for."""

    def __init__(self, tensor: Tensor, buffer: Tensor, before: weakref.ref[_Copy] | None) -> None:
        self.shape, self.device = tensor.shape, tensor.device
        self.buffer: Tensor | None = buffer
        self.before = before  # the copy made before this one, whose turn is next in the backward pass
        self.found: Tensor | None = None

    def view(self) -> Tensor:
        assert self.buffer is not None
        return self.buffer[: self.shape.numel()].view(self.shape)


class HostCopies:
    """Where recomputed layers' inputs wait. One for a model: its buffers are used again from step to step."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._newest: weakref.ref[_Copy] | None = None
        self._stream: torch.cuda.Stream | None = None
        # Copies between device and host that the computation has not waited for, oldest first: when each is done, and
        # its tensor on the device.
        self._under_way: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def saved(self) -> saved_tensors_hooks:
        """In its `with` block, what autograd saves is kept here. A graph may be run backward once. Raises UserError
        where the host's memory does not suffice."""
        return saved_tensors_hooks(self._to_host, self._to_device)

    def _to_host(self, tensor: Tensor) -> _Copy:
        copy = _Copy(tensor, self._buffer(tensor), self._newest)
        self._newest = weakref.ref(copy)
        self._begin(copy.view(), tensor, tensor)
        self._wait(UNDER_WAY)
        return copy

    def _to_device(self, copy: _Copy) -> Tensor:
        self._wait(0)  # what the forward pass has left, and this one where it is on its way
        if copy.found is None:
            self._fetch(copy)
            self._wait(0)
        found, before = copy.found, copy.before() if copy.before is not None else None
        assert found is not None
        copy.found = copy.before = None
        if self._stream is not None and before is not None and before.buffer is not None:
            self._fetch(before)
        return found

    def _fetch(self, copy: _Copy) -> None:
        """Begin to copy it back, and give up its buffer."""
        assert copy.buffer is not None, "a graph over copied inputs runs backward once"
        found = torch.empty(copy.shape, dtype=copy.buffer.dtype, device=copy.device)
        self._begin(found, copy.view(), found)
        self._free.append(copy.buffer)
        copy.found, copy.buffer = found, None

    def _begin(self, to: Tensor, source: Tensor, on_device: Tensor) -> None:
        """Begin a copy between device and host; on a CPU, make it. on_device: that of the two which is there."""
        side = self._side_stream(on_device.device)
        if side is None:
            to.copy_(source)
            return
        side.wait_stream(torch.cuda.current_stream(on_device.device))
        with torch.cuda.stream(side):
            to.copy_(source, non_blocking=True)
            self._under_way.append((side.record_event(), on_device))

    def _wait(self, left: int) -> None:
        """Let the computation wait for the oldest copies until so many are under way."""
        while len(self._under_way) > left:
            done, tensor = self._under_way.popleft()
            torch.cuda.current_stream(tensor.device).wait_event(done)

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
        return _host_memory(1 << max(count - 1, 0).bit_length(), tensor)


def _host_memory(count: int, like: Tensor) -> Tensor:
    """So many numbers of the tensor's type in the host's memory, pinned for a GPU's. UserError where there is none."""
    on_gpu = like.device.type == "cuda"
    try:
        return torch.empty(count, dtype=like.dtype, pin_memory=on_gpu)
    except RuntimeError as error:  # of no narrower type for the host's memory
        if isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", _NO_MEMORY) != _NO_MEMORY:
            raise  # of a kernel that was queued before
        kind = "pinned memory" if on_gpu else "memory"
        raise UserError(
            f"the host has no {count * like.dtype.itemsize / 1e9:.1f} GB of {kind} for the input of a recomputed layer",
            "Give the job more memory (Slurm's --mem, `ulimit -l`), share rows between more ranks "
            "(--sequence-parallel), or leave out --activation-offloading. docs/long-context.md says what it takes.",
        ) from error
