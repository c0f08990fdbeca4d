"""Per-layer statistics against autograd and the weights themselves, under every stage."""

from __future__ import annotations

import pytest
import torch

from lumina.model import Transformer
from lumina.train.deepspeed import LayerStats
from lumina.train.deepspeed.layers import layer_of
from tests.train.tiny_engines import EVERY, arrays, batch, make_config, make_engine, state_of, whole

LAYERS = ["embedding", "blocks.0", "blocks.1", "norm"]


def test_layers_by_name() -> None:
    assert layer_of("blocks.11.attention.qkv.weight") == "blocks.11"
    assert layer_of("embedding.weight") == "embedding"


@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_norms_are_those_of_gradient_weights_and_update(stage: int, precision: str) -> None:
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    made = make_engine(stage, precision, weight_decay=0.0, max_grad_norm=0.0)
    model = Transformer(make_config())
    for step in range(2):
        before = state_of(made)
        for name, parameter in model.named_parameters():
            parameter.data = before[f"master/{name}"].view(parameter.shape).clone()
            parameter.grad = None
        (model(*whole(arrays(step))) / 20).backward()
        stats = LayerStats(made)
        made.accumulate(batch(step), 1 / 20, last=True)
        stats.before()
        assert made.step()[1]
        found = stats.after()
        after = state_of(made)
        assert list(found) == LAYERS
        for layer, figures in found.items():
            own = {name: p for name, p in model.named_parameters() if layer_of(name) == layer}
            norm = lambda tensors: float(torch.cat([t.flatten() for t in tensors]).double().norm())
            gradient = norm(p.grad for p in own.values())
            update = norm(after[f"master/{name}"] - before[f"master/{name}"] for name in own)
            assert figures.gradient == pytest.approx(gradient, rel=tolerance), layer
            assert figures.weight == pytest.approx(norm(after[f"master/{name}"] for name in own), rel=1e-5), layer
            assert figures.update == pytest.approx(update, rel=1e-3), layer


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_looking_changes_nothing(stage: int) -> None:
    looked, other = (make_engine(stage) for _ in range(2))
    for step in range(2):
        for made in (looked, other):
            made.accumulate(batch(step), 1 / 20, last=True)
        stats = LayerStats(looked)
        stats.before()
        assert looked.step() == other.step()
        stats.after()
    one, two = state_of(looked), state_of(other)
    assert all(torch.equal(one[key], two[key]) for key in two)
