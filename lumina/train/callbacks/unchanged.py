"""Notices when code of the user's changes what training depends on: weights, moments, gradients, the optimizer's
settings, torch's random state, or the order of the samples. Nothing here waits for the device.

Two looks at a tensor. Its version, which torch counts up at every change in place, is compared around the call. And
during the call every operation that writes is seen, and the memory that it writes to is compared with the engine's:
`parameter.data.mul_(2)` leaves the parameter's version as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lumina.data import GlobalOrder
from lumina.train.deepspeed import Engine

_WEIGHTS, _MOMENTS, _GRADIENTS = "weights", "the optimizer's moments", "gradients"
_ORDER = ("num_samples", "global_batch_size", "seed", "fingerprint", "steps_per_epoch")


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """(what it is, tensor): everything that an update reads or writes. The optimizer's parameters are DeepSpeed's
    float32 copies where it keeps some."""
    own = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    for parameter in (*engine.model.parameters(), *own):
        yield _WEIGHTS, parameter
        if parameter.grad is not None:
            yield _GRADIENTS, parameter.grad
    for moments in engine.optimizer.state.values():
        for value in moments.values():
            if isinstance(value, Tensor):
                yield _MOMENTS, value


def _random_state() -> bytes:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state())  # seed and offset, which the host keeps
    return b"".join(np.from_dlpack(state).tobytes() for state in states)


@dataclass
class Observed:
    """What was there before the call. written: what operations wrote to during it."""

    versions: list[tuple[str, int, int]]  # what it is, its version, its address
    settings: list[dict[str, Any]]
    random: bytes
    order: dict[str, Any]
    memory: dict[int, str]
    written: set[str] = field(default_factory=set)

    @contextmanager
    def writes(self) -> Iterator[None]:
        """See every operation that writes, as long as this is open."""
        with _Writes(self.memory, self.written):
            yield


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, memory: dict[int, str], written: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory, self._written = memory, written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else given.get(argument.name)
                for one in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(one, Tensor):
                        self._written.update(filter(None, (self._memory.get(_address(one)),)))
        return func(*args, **given)


def _address(tensor: Tensor) -> int:
    """Of the memory that the tensor is a view of; 0 for none."""
    return tensor.untyped_storage().data_ptr()


def observe(engine: Engine, order: GlobalOrder) -> Observed:
    """What must be the same after a call."""
    found = list(_tensors(engine))
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    memory = {_address(tensor): what for what, tensor in found if _address(tensor)}
    versions = [(what, tensor._version, tensor.data_ptr()) for what, tensor in found]
    return Observed(versions, settings, _random_state(), {name: getattr(order, name) for name in _ORDER}, memory)


def changes(before: Observed, engine: Engine, order: GlobalOrder) -> list[str]:
    """What is not as it was, in words."""
    now = observe(engine, order)
    found = set(before.written)
    if len(now.versions) != len(before.versions):
        found.add(_GRADIENTS)
    else:
        found |= {old[0] for old, new in zip(before.versions, now.versions, strict=True) if old != new}
    if [group.get("lr") for group in before.settings] != [group.get("lr") for group in now.settings]:
        found.add("the learning rate")
    elif before.settings != now.settings:
        found.add("the optimizer's settings")
    if before.random != now.random:
        found.add("torch's random state")
    if before.order != now.order:
        found.add("the order of the samples")
    return sorted(found)
