"""Recomputed layers' inputs in the host's memory: the same bits."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lumina.config import UserError
from lumina.model import HostCopies, Transformer
from tests.model.memory import offload_checks
from tests.model.memory.simulated_streams import simulated
from tests.model.tiny_models import Packed, make_model, pack

BATCHES = [pack([20, 9], seed=1), pack([40, 23], seed=2), pack([11], seed=3)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def to(batch: Packed, device: str) -> Packed:
    return Packed(*(x.to(device) if isinstance(x, Tensor) else x for x in batch))


def gradients(model: Transformer, losses: list[Tensor], order: list[int]) -> list[list[Tensor]]:
    """The gradients of each loss, whose backward passes run in that order."""
    found: dict[int, list[Tensor]] = {}
    for number in order:
        model.zero_grad()
        losses[number].backward()  # type: ignore[no-untyped-call]
        found[number] = [p.grad.to_dense().clone() for p in model.parameters() if p.grad is not None]
    return [found[number] for number in range(len(losses))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("together", [False, True])
def test_the_same_bits(device: str, every: int, together: bool) -> None:
    """Batches one after another, in buffers that are used again, larger and smaller; and all forward passes before the
    first backward pass, in another order."""
    results = []
    for copies in (None, HostCopies()):
        model = make_model(num_layers=4).to(device)
        model.checkpoint_every, model.host_copies = every, copies
        batches = [to(batch, device) for batch in BATCHES]
        if together:
            results.append(gradients(model, [model(*batch) for batch in batches], [1, 0, 2]))
        else:
            results.append([gradients(model, [model(*batch)], [0])[0] for batch in batches for _ in range(2)])
    for plain, copied in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, copied, strict=True))


def test_inputs_are_not_kept_beside_their_copies() -> None:
    """After the forward pass the device has no recomputed layer's input any more."""
    alive = []
    for copies in (None, HostCopies()):
        model = make_model(num_layers=3)
        model.checkpoint_every, model.host_copies = 1, copies
        inputs: list[weakref.ref[torch.UntypedStorage]] = []
        for block in model.blocks:
            block.register_forward_pre_hook(
                lambda _, x, inputs=inputs: inputs.append(weakref.ref(x[0].untyped_storage()))
            )
        loss = model(*BATCHES[0])
        gc.collect()
        alive.append(sum(one() is not None for one in inputs))
        loss.backward()
    assert alive == [3, 0]


def test_a_graph_that_never_runs_backward_leaves_nothing() -> None:
    """As after an error between the passes."""
    model = make_model(num_layers=3)
    model.checkpoint_every, model.host_copies = 1, HostCopies()
    first = gradients(model, [model(*BATCHES[0])], [0])
    model(*BATCHES[1])
    again = gradients(model, [model(*BATCHES[0])], [0])
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))


def test_the_same_bits_of_many_layers() -> None:
    offload_checks.check_bits("cpu", None)


def test_on_simulated_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """No access to the GPU's memory or the host's buffers comes beside another, whatever takes the place of what; also
    after a backward pass that ends half-way. A pass takes seven blocks of the GPU: what offload_checks counts, and
    the first input."""
    with FakeTensorMode(), simulated(monkeypatch) as streams:
        hooks = HostCopies().saved()
        for end in (0, 0, 8, 16, 0):  # layers whose backward pass is left out
            start = x = torch.zeros(64, device="cuda")
            kept = []
            for _ in range(16):
                y = x.sin()
                kept.append(hooks.pack_hook(x))
                x = y
            gradient = torch.zeros_like(start)
            while len(kept) > end:
                x = hooks.unpack_hook(kept.pop())
                y = x.sin()
                gradient = gradient * x.cos()
            del kept, start, x, y, gradient
    assert streams.races == []
    assert streams.made == {256: 7}


@needs_gpu
@pytest.mark.parametrize("late", ["computation", "copies"])
def test_copies_and_computation_wait_for_each_other(late: offload_checks.Late) -> None:
    offload_checks.check_bits("cuda", late)


@needs_gpu
def test_the_gpu_holds_few_inputs_however_far_ahead_the_host_is() -> None:
    forward, backward = offload_checks.most_held()
    assert forward <= offload_checks.FORWARD
    assert backward <= offload_checks.BACKWARD


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError


def test_memory_that_the_host_lacks_is_the_users_to_give() -> None:
    x = torch.ones(1, requires_grad=True).expand(1 << 50)
    with HostCopies().saved(), pytest.raises(UserError, match=r"host has no 4503599.6 GB of memory.*\n.*--mem"):
        Keep.apply(x)  # type: ignore[no-untyped-call]
