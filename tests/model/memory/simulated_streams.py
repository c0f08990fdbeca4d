"""Streams of a GPU, played on fake tensors: whether accesses to a block of memory are ordered, and how many blocks
there are.

Every operator belongs to the stream that is current. What a stream has waited for is a vector clock: of two accesses to
a block, one of them a write, the later one's stream must have waited for the earlier one. A tensor that ends leaves its
block to the stream that it was made on, and the next one there takes it at once, as torch's allocator has it.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event:
    def __init__(self, clock: Counter[Stream]) -> None:
        self.clock = clock


class Stream:
    """clock: of each stream, how many of its operators come before whatever is queued here next."""

    def __init__(self) -> None:
        self.clock: Counter[Stream] = Counter()

    def record_event(self) -> Event:
        return Event(self.clock.copy())

    def wait_event(self, event: Event) -> None:
        self.clock |= event.clock

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


@dataclass
class Block:
    """accesses: the last read and the last write by each stream, as its clock had it then."""

    accesses: dict[tuple[Stream, bool], int] = field(default_factory=dict)


class Streams(TorchDispatchMode):
    """In its `with` block, inside a FakeTensorMode. races: operators that some earlier access may still meet. made:
    blocks of the GPU by their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.current = Stream()
        self.races: list[str] = []
        self.made: Counter[int] = Counter()
        self._blocks: dict[int, Block] = {}
        self._free: defaultdict[tuple[Stream, int], list[Block]] = defaultdict(list)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """What torch.cuda.stream is."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        writes = func._schema.is_mutable
        if not writes and any(one.alias_info for one in func._schema.returns):
            return found  # a view
        self.current.clock[self.current] += 1
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        for number, tensor in enumerate(given):
            self._access(func, self._block(tensor), writes and number == 0)
        if not writes:
            for tensor in (one for one in tree_leaves(found) if isinstance(one, Tensor)):
                block = self._block(tensor)
                if "empty" not in func.name():
                    self._access(func, block, True)
        return found

    def _block(self, tensor: Tensor) -> Block:
        storage = tensor.untyped_storage()
        key, size, stream = storage._cdata, storage.nbytes(), self.current
        if key not in self._blocks:
            free = self._free[stream, size]
            on_gpu = tensor.device.type == "cuda"
            self.made[size] += on_gpu and not free
            self._blocks[key] = free.pop() if on_gpu and free else Block()
            weakref.finalize(storage, self._end, key, (stream, size) if on_gpu else None)
        return self._blocks[key]

    def _end(self, key: int, pool: tuple[Stream, int] | None) -> None:
        block = self._blocks.pop(key)
        if pool is not None:
            self._free[pool].append(block)

    def _access(self, func: Any, block: Block, write: bool) -> None:
        clock = self.current.clock
        for (stream, written), time in block.accesses.items():
            if (write or written) and clock[stream] < time:
                self.races.append(f"{func.name()} {'writes' if write else 'reads'} too early")
        block.accesses[self.current, write] = clock[self.current]


@contextmanager
def simulated(monkeypatch: Any) -> Iterator[Streams]:
    """torch.cuda's streams are these."""
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.current)
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    # By its own way it looks for the device first, which a build of torch without CUDA refuses.
    monkeypatch.setattr(Tensor, "copy_", lambda to, *given, **kinds: torch.ops.aten.copy_.default(to, *given, **kinds))
    with streams:
        yield streams
