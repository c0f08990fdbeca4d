"""Recomputed activations and torch.compile change nothing but memory and speed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lumina.model import Transformer, ops
from lumina.model.transformer import Block
from tests.model.tiny_models import Packed, make_model, pack


def gradients(model: Transformer, batch: Packed) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(*batch)
    loss.backward()  # DeepSpeed's checkpointing does not go with torch.autograd.grad
    return loss.detach(), [p.grad.to_dense() for p in model.parameters() if p.grad is not None]


class Count:
    """How often a block ran forward."""

    def __init__(self, model: Transformer) -> None:
        self.calls = [0] * len(model.blocks)
        for layer, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, layer=layer: self.note(layer))

    def note(self, layer: int) -> None:
        self.calls[layer] += 1


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("every", "calls"), [(0, [1, 1, 1]), (1, [2, 2, 2]), (2, [2, 1, 2]), (3, [2, 1, 1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_layers_give_identical_gradients(every: int, calls: list[int], dtype: torch.dtype) -> None:
    """Bit for bit; and layers 0, n, 2n, ... are the ones that run twice."""
    model, batch = make_model(dtype=dtype, num_layers=3), pack([20, 9])
    loss, expected = gradients(model, batch)
    model.checkpoint_every = every
    count = Count(model)
    again, found = gradients(model, batch)
    assert torch.equal(loss, again)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert count.calls == calls


def test_recomputed_experts_route_once() -> None:
    """The routers' losses come out of the recomputed layers: the gradients are the same, and each token counts once."""
    found = []
    for every in (0, 1, 2):
        experts = {"count": 4, "size": 24, "dense_layers": [1]}
        model, batch = make_model(family="qwen3_moe", experts=experts, num_layers=3), pack([20, 9])
        model.config.router_aux_loss_coef, model.config.router_z_loss_coef = 0.5, 0.1
        model.checkpoint_every = every
        _, own = gradients(model, batch)
        counts = model.take_routing_counts()
        assert counts is not None
        found.append([*own, counts])
    for recomputed in found[1:]:
        for a, b in zip(recomputed, found[0], strict=True):
            assert torch.equal(a, b)


def test_nothing_is_recomputed_in_evaluation() -> None:
    model, batch = make_model().eval(), pack([20, 9])
    model.checkpoint_every = 1
    count = Count(model)
    gradients(model, batch)
    assert count.calls == [1, 1]


def test_recomputation_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes are saved between the passes of the recomputed layers: the feature's only purpose."""
    kept = []
    for every in (0, 1):
        model, batch = make_model(num_layers=3), pack([60])
        model.checkpoint_every = every
        bytes_: dict[int, int] = {}

        def note(tensor: Tensor, bytes_: dict[int, int] = bytes_) -> Tensor:
            bytes_[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = model(*batch)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for place, size in bytes_.items() if place not in own))
        loss.backward()
    assert kept[1] < kept[0] / 3


@pytest.mark.long
def test_compiled_model() -> None:
    """Compiled as a run compiles it, block by block; two batches of different shapes and documents, compiled once."""
    eager, model = (make_model(num_layers=1) for _ in range(2))
    model.compile_blocks()
    for lengths in ([20, 9], [7, 30, 4]):
        batch = pack(lengths)
        (loss, expected), (compiled, found) = gradients(eager, batch), gradients(model, batch)
        torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=1e-5)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_blocks_return_the_pending_sum() -> None:
    """A block's (delta, residual) add up to what a plain pre-norm layer returns."""
    model = make_model(dtype=torch.float64)
    block = model.blocks[0]
    assert isinstance(block, Block)
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = ops.Rotary.of(torch.arange(5)[None], 8, 10000.0)
    after = x + block.attention(ops.rms_norm(x, block.attention_norm.weight, 1e-5), rotary, None, None)
    expected = after + block.feed_forward(ops.rms_norm(after, block.feed_forward_norm.weight, 1e-5))
    for residual in (None, torch.zeros_like(x)):
        delta, total = block(x, residual, rotary)
        torch.testing.assert_close(delta + total, expected)
