"""Staging buffers: (pinned) host memory for snapshots, and the copies into it beside the training.

torch's pinned-memory allocator rounds every buffer up to a power of two: a buffer for each tensor of `large` on one GPU
would take 27 GB for 19.5. Here the tensors lie one after another in a few slabs whose sizes are powers of two, so that
nothing is rounded; a tensor that meets the end of a slab goes on in the next one. Slabs are kept for the next snapshot:
memory touched before is copied to several times as fast (page faults), and pinning costs more than copying.

On a GPU the copies run on a stream of their own while the next step computes. Three orders make them a picture of one
step (law 6), and none of them stops the host:

    the update before -> the copies            the copy stream waits for the stream of the training
    the copies -> the update after             `before_update`: the stream of the training waits for an event
    the copies -> the writer reads             the writer's thread waits for the same event
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

SLAB = 2**30  # bytes of the largest slab
_ALIGN = 64  # every tensor begins, and is cut, at a multiple of these bytes


def slab_sizes(total: int) -> list[int]:
    """Powers of two that hold `total` bytes, largest first. At most a thirty-second of it is wasted (or 63 bytes)."""
    sizes = [SLAB] * (total // SLAB)
    rest = total % SLAB
    if rest:
        unit = max(_ALIGN, (1 << (rest.bit_length() - 1)) // 32)
        units = -(-rest // unit)
        sizes += [unit << bit for bit in reversed(range(units.bit_length())) if units >> bit & 1]
    return sizes


class Slabs:
    """Byte buffers that grow and are never given back."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._slabs: list[Tensor] = []

    @property
    def bytes(self) -> int:
        return sum(len(slab) for slab in self._slabs)

    def lay_out(self, values: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Room for each value, in its type: flat host tensors that together have its elements. What an earlier call
        gave is given again."""
        missing = sum(map(_room, values.values())) - self.bytes
        for size in slab_sizes(max(0, missing)):
            self._slabs.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))
        cursor = _Cursor(self._slabs)
        return {name: list(cursor.next(value)) for name, value in values.items()}


def _room(value: Tensor) -> int:
    return -(-value.numel() * value.element_size() // _ALIGN) * _ALIGN


class _Cursor:
    """Allocates from the slabs in their order."""

    def __init__(self, slabs: list[Tensor]) -> None:
        self._slabs, self._slab, self._at = slabs, 0, 0

    def next(self, value: Tensor) -> Iterator[Tensor]:
        left, room = value.numel() * value.element_size(), _room(value)
        while room:
            slab = self._slabs[self._slab]
            take = min(room, len(slab) - self._at)
            if take:
                yield slab[self._at : self._at + min(take, left)].view(value.dtype)
            left, room, self._at = left - min(take, left), room - take, self._at + take
            if self._at == len(slab) and self._slab + 1 < len(self._slabs):
                self._slab, self._at = self._slab + 1, 0


class StagingBuffer:
    """The host memory that a rank's snapshots are copied to, each over the one before. `device`: the engine's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._slabs = Slabs(pinned=self._stream is not None)
        self._under_way: Any = None  # the event behind copies that no update waits for yet

    @property
    def bytes(self) -> int:
        """Host memory that is held."""
        return self._slabs.bytes

    def copy(self, values: Mapping[str, Tensor]) -> tuple[dict[str, list[Tensor]], Any]:
        """Copy flat tensors. Returns them on the host, and the event behind the copies (None: they are there).

        Until that event nobody may read the result, free the values or overwrite them: an update calls `before_update`
        first. The result is overwritten by the next call."""
        copies = self._slabs.lay_out(values)
        if self._stream is None:
            _fill(copies, values)
            return copies, None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _fill(copies, values)
        # blocking: the writer's thread sleeps until the event, rather than keep a core from the training.
        self._under_way = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._under_way.record(self._stream)
        return copies, self._under_way

    def before_update(self) -> None:
        """What the device is given from now on may overwrite the values of the last copy."""
        if self._under_way is not None:
            torch.cuda.current_stream(self._device).wait_event(self._under_way)
            self._under_way = None


@torch.no_grad()
def _fill(copies: Mapping[str, list[Tensor]], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        begin = 0
        for part in copies[name]:
            part.copy_(value[begin : begin + len(part)], non_blocking=True)
            begin += len(part)
