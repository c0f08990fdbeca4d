"""8-bit products against numbers rounded by search among the type's own values, and training with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lumina.config import Config, UserError
from lumina.model import float8
from tests.model.tiny_models import make_model, pack

RECIPES = ("tensorwise", "rowwise")
SHAPE = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96, "init_std": 0.1}


def numbers(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> Tensor:
    """Every finite value of an 8-bit type, ascending, by its definition (arXiv:2209.05433, section 3)."""
    found = set()
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            part = mantissa / 2**mantissa_bits
            value = part * 2.0 ** (1 - bias) if exponent == 0 else (1 + part) * 2.0 ** (exponent - bias)
            if value <= largest:
                found |= {value, -value}
    return torch.tensor(sorted(found), dtype=torch.float64)


E4M3, E5M2 = numbers(4, 3, 7, 448.0), numbers(5, 2, 15, 57344.0)


def rounded(x: Tensor, values: Tensor, recipe: str) -> Tensor:
    """x as the recipe's 8-bit numbers times their scale, in float64: the nearest value of all, by brute force; of two
    that are as near, the one with an even last bit."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) if recipe == "rowwise" else x.abs().amax()) / float(values[-1])
    distance = ((x / scale).double()[..., None] - values).abs()
    odd = (torch.arange(len(values)) - len(values) // 2) % 2  # counted from zero, whose bits are all 0
    nearest = distance == distance.amin(-1, keepdim=True)
    return values[torch.where(nearest, odd, 2).argmin(-1)] * scale.double()


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to two roundings to bfloat16 and float32 sums."""
    error = (found.detach().double() - expected.detach()).abs()
    assert error.max() <= 2**-8 * expected.abs().max() + 1e-6
    assert error.norm() <= 2**-9 * expected.norm()


@pytest.mark.parametrize(("dtype", "values"), [(torch.float8_e4m3fn, E4M3), (torch.float8_e5m2, E5M2)])
def test_numbers_are_the_types_own(dtype: torch.dtype, values: Tensor) -> None:
    bits = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    assert torch.equal(bits[bits.isfinite()].unique(), values)


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_and_gradients_against_rounding_by_search(recipe: Any) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 32, bias=True)
    layer.weight.data *= 3
    layer.to(torch.bfloat16)
    layer.__class__, layer.recipe = float8.Float8Linear, recipe
    x = (torch.randn(1, 64, 48) * torch.logspace(-2, 2, 64)[:, None]).bfloat16().requires_grad_()
    dy = torch.randn(1, 64, 32).mul(1e-3).bfloat16()
    y = layer(x)
    y.backward(dy)
    rows, weight, upstream = x.detach()[0], layer.weight.detach(), dy[0]
    close(y[0], rounded(rows, E4M3, recipe) @ rounded(weight, E4M3, recipe).T + layer.bias.double())
    of_gradient = E5M2 if recipe == "tensorwise" else E4M3
    close(x.grad[0], rounded(upstream, of_gradient, recipe) @ rounded(weight.T, E4M3, recipe).T)
    if recipe == "rowwise":
        close(layer.weight.grad, upstream.double().T @ rows.double())
    else:
        close(layer.weight.grad, rounded(upstream.T, E5M2, recipe) @ rounded(rows.T, E4M3, recipe).T)
    close(layer.bias.grad, upstream.double().sum(0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_stay_zeros(recipe: Any) -> None:
    x, weight = torch.zeros(16, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    assert torch.equal(float8.multiply(x, weight, recipe), torch.zeros(16, 48).bfloat16())


def test_rowwise_a_token_does_not_depend_on_its_neighbours() -> None:
    """Law 2: y and dx of a token are the same in any micro-batch; by tensor they are not."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    loud = torch.cat((x[:32], 100 * x[32:]))
    same = {
        recipe: torch.equal(float8.multiply(x, weight, recipe)[:32], float8.multiply(loud, weight, recipe)[:32])
        for recipe in RECIPES
    }
    assert same == {"rowwise": True, "tensorwise": False}


def step_losses(recipe: Any, steps: int) -> list[float]:
    model = make_model(dtype=torch.bfloat16, **SHAPE)
    if recipe is not None:
        float8.convert(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = pack((40, 24), seed=1)
    losses = []
    for _ in range(steps):
        loss = model(*batch) / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_follows_bfloat16() -> None:
    plain = step_losses(None, 30)
    assert plain[-1] < 0.2 * plain[0]
    for recipe in RECIPES:
        found = step_losses(recipe, 30)
        assert found[0] != plain[0]  # the products are in 8 bits indeed
        assert all(abs(a - b) < 0.06 * plain[0] for a, b in zip(found, plain, strict=True))


def test_names_draws_and_evaluation_stay() -> None:
    plain, model = make_model(dtype=torch.bfloat16, **SHAPE), make_model(dtype=torch.bfloat16, **SHAPE)
    float8.convert(model, "rowwise")
    assert {n: p.tolist() for n, p in plain.named_parameters()} == {n: p.tolist() for n, p in model.named_parameters()}
    batch = pack((40, 24), seed=1)
    assert model(*batch) != plain(*batch)
    model.eval()
    assert model(*batch) == plain(*batch)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UserError, match="feed_forward"):
        float8.convert(make_model(**SHAPE | {"intermediate_size": 100}), "rowwise")
    shape: dict[str, Any] = {**SHAPE, "num_layers": 1, "seq_length": 64}
    with pytest.raises(UserError, match="fp32"):
        float8.check(Config(**shape, precision="fp32", float8="rowwise"))
    with pytest.raises(UserError, match="lora_rank"):
        float8.check(Config(**shape, precision="bf16", float8="rowwise", lora_rank=4))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_layers_multiply_as_the_others(recipe: Any) -> None:
    """DeepSpeed's checkpointing runs a layer's first pass without gradients: it is float8 all the same."""
    found = []
    for every in (0, 1):
        model = make_model(dtype=torch.bfloat16, **SHAPE)
        float8.convert(model, recipe)
        model.checkpoint_every = every
        loss = model(*pack((40, 24), seed=1))
        loss.backward()
        found.append((loss.item(), [p.grad.tolist() for p in model.parameters() if p.grad is not None]))
    assert found[0] == found[1]


def test_rowwise_in_tiles_of_tokens_and_groups_of_heads() -> None:
    """A token's scale is its own, and so is a row's of the weights: the loss is the same to the bit, and the weights'
    gradients to the rounding of each tile's product."""
    found = []
    for tile, groups in ((0, 1), (24, 2)):
        model = make_model(dtype=torch.bfloat16, **SHAPE)
        float8.convert(model, "rowwise")
        model.tile_feed_forward(tile)
        model.group_heads(groups)
        loss = model(*pack((40, 24), seed=1))
        loss.backward()
        found.append((loss, [p.grad.double() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    for plain, tiled in zip(found[0][1], found[1][1], strict=True):
        assert (tiled - plain).norm() <= 2**-7 * plain.norm()
