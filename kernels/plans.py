"""Launch plans: what a call of an operator needs besides its tensors' addresses, worked out once per signature.

Building a `Launch` (views, tiles, grid) and Triton's own way to a compiled kernel (binding arguments, looking at each
for alignment, a cache key) cost the host tens of microseconds a call, more than a small kernel runs. All of it is a
function of shapes, strides, types and scalars. So the first call of a signature goes that way, once, with all checks;
what Triton compiled is kept, and later calls hand it their addresses. The same kernels are launched with the same
arguments: the one difference is who looked them up. Addresses that are not multiples of 16 bytes, on which Triton's
choice of code rests too, take the long way each time, and so do tensors that had to be copied into rows.

In Triton's interpreter nothing is kept: it returns no compiled kernel.

`direct` says whether an operator may be called without PyTorch's dispatcher, which costs as much again: only where
nobody listens there (no tracing, no mode, no functorch transform, no subclass).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from . import launch
from .launch import Launch

#: Signatures kept at most: a run whose token counts differ in every step must not grow for ever.
MOST_PLANS = 4096

#: Bytes to which Triton takes a pointer to be aligned, or not.
_ALIGNMENT = 16

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def direct(first: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether these are plain tensors that a kernel can run on, outside of anything that must see an operator."""
    if torch.compiler.is_compiling():
        return False
    for tensor in others:  # no generator: this runs before every operator
        if type(tensor) not in _PLAIN:
            return False
    return (
        (first.is_cuda or (launch.INTERPRETED and first.is_cpu))
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and type(first) in _PLAIN
    )


def signature(*tensors: torch.Tensor) -> tuple[Any, ...]:
    """What a plan depends on: shape, strides, type and device of each tensor."""
    return tuple([(t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors])


def distinct(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as objects of their own, so that each argument of a launch tells which of them it is."""
    return [tensor.view(tensor.shape) for tensor in tensors]


@dataclass(frozen=True)
class _Step:
    """One compiled kernel: places of its pointers among a plan's addresses, and the arguments that follow them."""

    compiled: Any
    grid: tuple[int, int, int]
    pointers: tuple[int, ...]
    rest: tuple[Any, ...]


def _hooked() -> bool:
    """Whether somebody (a profiler) asked Triton to be called around each launch."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Chains since Triton 3.5, empty as a rule; whatever else is set there is a hook.
    return bool((enter is not None and getattr(enter, "calls", True)) or (leave and getattr(leave, "calls", True)))


class Plan:
    """The compiled launches of one signature; called with the signature's inputs and outputs, in the order kept."""

    __slots__ = ("_calls", "_device", "_scratch", "_steps")

    def __init__(self, steps: list[_Step], scratch: list[torch.Tensor], device: int) -> None:
        self._steps = steps
        self._scratch = [(tensor.shape, tensor.dtype) for tensor in scratch]
        self._device = device
        # As JITFunction.run calls a compiled kernel, where no hook is set.
        self._calls = [
            (step.compiled.run, step.grid, (step.compiled.function, step.compiled.packed_metadata, None, None, None),
             step.pointers, step.rest)
            for step in steps
        ]  # fmt: skip

    def __call__(self, *tensors: torch.Tensor) -> bool:
        """Launch on these tensors' memory; False, with nothing launched, where an address is not aligned."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        for address in addresses:
            if address % _ALIGNMENT:
                return False
        # Held until the launches are in the stream: the allocator then keeps its order.
        scratch = [tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in self._scratch]
        addresses += [tensor.data_ptr() for tensor in scratch]
        driver = triton.runtime.driver.active
        current = driver.get_current_device()
        if self._device not in (current, -1):
            with torch.cuda.device(self._device):
                self._launch(addresses, driver.get_current_stream(self._device))
        else:
            self._launch(addresses, driver.get_current_stream(current))
        return True

    def _launch(self, addresses: list[int], stream: int) -> None:
        if _hooked():
            for step in self._steps:
                step.compiled[step.grid](*[addresses[index] for index in step.pointers], *step.rest, stream=stream)
            return
        for run, grid, handles, pointers, rest in self._calls:
            run(*grid, stream, *handles, *[addresses[index] for index in pointers], *rest)


class Plans(dict[Any, Plan]):
    """The plans of one operator by signature."""

    def run(
        self, key: Any, launches: list[Launch], arguments: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Run launches the long way and keep their plan under `key`.

        `tensors` are the operator's inputs and outputs as a plan will be given them, `arguments` the same as they were
        given to the launches (rows of them; objects of their own, see `distinct`). What else the launches read or
        write is scratch memory, made anew by each call.
        """
        compiled = [run() for run in launches]
        if not all(hasattr(kernel, "packed_metadata") for kernel in compiled):
            return  # interpreted
        if any(a.data_ptr() != t.data_ptr() for a, t in zip(arguments, tensors, strict=True)):
            return  # a copy, not a view
        if any(t.data_ptr() % _ALIGNMENT for t in tensors):
            return  # compiled for these addresses, and few others
        places = {id(argument): index for index, argument in enumerate(arguments)}
        scratch: list[torch.Tensor] = []
        steps = [
            _step(run, kernel, places, scratch, len(arguments)) for run, kernel in zip(launches, compiled, strict=True)
        ]
        if len(self) >= MOST_PLANS:
            self.clear()
        self[key] = Plan(steps, scratch, tensors[0].get_device())


def _step(run: Launch, kernel: Any, places: dict[int, int], scratch: list[torch.Tensor], given: int) -> _Step:
    count = sum(isinstance(argument, torch.Tensor) for argument in run.args)
    pointers = []
    for tensor in run.args[:count]:
        assert isinstance(tensor, torch.Tensor), "a kernel's pointers come before its numbers"
        if id(tensor) not in places:
            places[id(tensor)] = given + len(scratch)
            scratch.append(tensor)
        pointers.append(places[id(tensor)])
    names = run.kernel.arg_names
    rest = (*run.args[count:], *(run.constants[name] for name in names[len(run.args) :]))
    x, y, z = (*run.grid, 1, 1)[:3]
    return _Step(kernel, (x, y, z), tuple(pointers), rest)
