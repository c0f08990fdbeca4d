"""The feed-forward tile by tile is the feed-forward of all tokens, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lumina.config import LoraConfig
from lumina.model import Transformer, lora
from tests.model.tiny_models import Packed, check_errors, make_model, pack

TOKENS = 60


def computed(model: Transformer, batch: Packed) -> list[Tensor]:
    """The loss and the gradient of each trained parameter."""
    model.zero_grad()
    loss = model(*batch)
    loss.backward()  # DeepSpeed's checkpointing does not go with torch.autograd.grad
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert None not in gradients
    return [loss.detach(), *(g.to_dense() for g in gradients if g is not None)]


def equal(found: list[Tensor], expected: list[Tensor], to: float) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= to * b.norm(), number


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "granite"])
def test_float64(family: str) -> None:
    """Norms before the feed-forward, after it and both; tiles that divide the row and that do not, a last tile of one
    token, a single tile, one larger than the row; recomputed layers or not; one row of documents and two rows."""
    more = {"residual_multiplier": 0.7} if family == "granite" else {}
    model, batch = make_model(dtype=torch.float64, family=family, **more), pack([20, 9, 31])
    two_rows = Packed(batch.ids.view(2, -1), batch.positions.view(2, -1) % 30, *batch[2:])
    for args in (batch, (*two_rows[:2], None, None, *(x.view(2, -1) for x in batch[4:]))):
        model.tile_feed_forward(0)
        model.checkpoint_every = 0
        expected = computed(model, args)
        for tile in (1, 7, 29, 59, TOKENS, 100):
            for every in (0, 1):
                model.tile_feed_forward(tile)
                model.checkpoint_every = every
                # A tile of a few tokens is another kernel's product, which adds up in another order.
                equal(computed(model, args), expected, 1e-14 if tile < 7 else 1e-15)


@pytest.mark.usefixtures("path")
def test_bfloat16() -> None:
    """The tiles' weight gradients add up in float32: as near to float64 as one product of all tokens. The forward pass
    is bit for bit the same."""
    batch = pack([300])  # 43 tiles: sums in bfloat16 would be 2.7 times as far off as the plain product
    exact = computed(make_model(dtype=torch.bfloat16).double(), batch)
    model = make_model(dtype=torch.bfloat16)
    plain = computed(model, batch)
    model.tile_feed_forward(7)
    found = computed(model, batch)
    assert torch.equal(found[0], plain[0])
    check_errors(found[1:], plain[1:], exact[1:])


def test_adapters() -> None:
    """In the feed-forward, over frozen weights."""
    found = []
    for tile in (0, 13):
        torch.manual_seed(1)
        model = make_model(dtype=torch.float64)
        settings = LoraConfig(lora_rank=3, lora_targets=["q_proj", "gate_proj", "down_proj"])
        lora.attach(model, settings)
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                torch.nn.init.normal_(parameter)
        model.double().tile_feed_forward(tile)
        model.checkpoint_every = 1
        found.append(computed(model, pack([20, 9, 31])))
    equal(found[1], found[0], 1e-15)


@pytest.mark.parametrize("every", [0, 1])
def test_each_tile_is_computed_twice_and_each_gradient_given_once(every: int) -> None:
    """Forward, and again for its backward: recomputed layers cost no third time. DeepSpeed reduces a gradient whenever
    autograd has one."""
    model = make_model()
    model.tile_feed_forward(25)
    model.checkpoint_every = every
    tiles: list[int] = []
    given: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda _: given.update({name: given.get(name, 0) + 1})

    model.blocks[1].feed_forward.gate_up.register_forward_hook(lambda *args: tiles.append(args[2].shape[1]))
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(note(name))
    computed(model, pack([20, 9, 31]))
    assert tiles == [25, 25, 10] * 2
    assert given == {name: 1 for name, _ in model.named_parameters()}


def test_what_is_inside_exists_for_one_tile() -> None:
    """Between the passes nothing of the feed-forward's width is kept."""
    inside: dict[int, bool] = {}
    for tile in (0, 8):
        model = make_model(num_layers=1, intermediate_size=128)
        model.tile_feed_forward(tile)
        own = {p.data_ptr() for p in model.parameters()}
        kept: list[Tensor] = []

        def note(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(*pack([TOKENS]))
        inside[tile] = any(x.dim() > 1 and x.shape[-1] >= 128 and x.data_ptr() not in own for x in kept)
    assert inside == {0: True, 8: False}


def test_in_evaluation() -> None:
    model, batch = make_model(dtype=torch.float64).eval(), pack([20, 9, 31])
    with torch.no_grad():
        expected = model(*batch)
        model.tile_feed_forward(7)
        assert torch.equal(model(*batch), expected)
