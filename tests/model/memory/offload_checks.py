"""What HostCopies promises: the bits of layers that keep their inputs, and on a GPU a bounded number of inputs there.

Copies and computation run on streams of their own there. One that does not wait for the other mostly comes in time all
the same, so either is made late here, by a kernel that only passes time. A module that imports torch and lumina alone:
benchmarks/gpu_day runs it too.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lumina.model import HostCopies

LAYERS = 16
Late = Literal["computation", "copies"]
#: Inputs that may be on the device in a forward pass beside the first: two on their way, a layer's own and its result.
FORWARD = 4
#: And in a backward pass: the last result; a layer's input and that of the one below; its result again, the gradient of
#: that, the cosine and the gradient of the input; and one to spare.
BACKWARD = 8

_CYCLES = 20_000_000  # of the device's clock, some 10 ms: a copy here takes less than one


class _LateCopies(TorchDispatchMode):
    """Time passes before each copy between device and host, on the stream that makes it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].device.type != args[1].device.type:
            torch.cuda._sleep(_CYCLES)
        return func(*args, **(kwargs or {}))


def forward(start: Tensor, copies: HostCopies | None, late: Late | None = None) -> Tensor:
    """The result of LAYERS recomputed layers, each a sine: its gradient needs its input."""

    def layer(x: Tensor) -> Tensor:
        if late == "computation":
            torch.cuda._sleep(_CYCLES)
        return x.sin()

    x = start
    for _ in range(LAYERS):
        with nullcontext() if copies is None else copies.saved():
            x = checkpoint(layer, x, use_reentrant=True)
    return x


def _passes(start: Tensor, copies: HostCopies | None, late: Late | None) -> tuple[Tensor, Tensor]:
    """Result and gradient."""
    start.grad = None
    with _LateCopies() if late == "copies" else nullcontext():
        result = forward(start, copies, late)
        result.sum().backward()  # type: ignore[no-untyped-call]
    assert start.grad is not None
    return result.detach(), start.grad


def check_bits(device: str, late: Late | None) -> None:
    """Assert that copied inputs give the bits of kept ones: in buffers that are used again, also by smaller inputs, and
    after a forward pass without a backward pass."""
    torch.manual_seed(0)
    copies = HostCopies()
    for rows in (1024, 1024, 512):
        start = torch.rand(rows, 1024, device=device, requires_grad=True)
        kept = _passes(start, None, None)
        forward(start, copies, late)
        copied = _passes(start, copies, late)
        assert all(torch.equal(a, b) for a, b in zip(kept, copied, strict=True))


def most_held() -> tuple[float, float]:
    """Inputs of layers that are on the GPU at most, in a forward and in a backward pass which the host queues as a
    whole before the GPU begins; beside the first layer's."""
    start = torch.rand(4, 1024, 1024, device="cuda", requires_grad=True)  # 16 MiB: the allocator rounds nothing up
    gradient = torch.ones_like(start)
    copies, most = HostCopies(), []
    forward(start, copies).backward(gradient)  # pinned memory is there from now on: to allocate it waits for the GPU
    start.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(100 * _CYCLES)
    torch.cuda.reset_peak_memory_stats()
    result = forward(start, copies)
    most.append(_active_peak())
    torch.cuda.reset_peak_memory_stats()
    result.backward(gradient)  # type: ignore[no-untyped-call]
    most.append(_active_peak())
    return (most[0] - before) / start.nbytes, (most[1] - before) / start.nbytes


def _active_peak() -> int:
    """Bytes: of what is allocated, and of what is freed but waits for an event."""
    peak: int = torch.cuda.memory_stats()["active_bytes.all.peak"]
    return peak
