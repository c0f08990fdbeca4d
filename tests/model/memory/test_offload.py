"""Recomputed layers' inputs in the host's memory: the same bits."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from lumina.model import HostCopies, Transformer
from tests.model.tiny_models import Packed, make_model, pack

BATCHES = [pack([20, 9], seed=1), pack([40, 23], seed=2), pack([11], seed=3)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


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
