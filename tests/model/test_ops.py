"""Every operator in bfloat16 against float64, on both CPU paths: outputs, all gradients, odd shapes, strides, NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.config import UserError
from lumina.model import ops
from tests.model.tiny_models import check_errors, run

EPS = 1e-5
SHAPES = [(1, 1), (1, 7), (3, 33), (17, 64), (5, 100), (2, 3, 130)]

pytestmark = pytest.mark.usefixtures("path", "poison")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw) * scale).bfloat16().requires_grad_()


def strided(x: Tensor) -> Tensor:
    """The same values, every second column of a wider tensor of NaN."""
    store = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = store[..., : 2 * x.shape[-1] : 2]
    view.copy_(x.detach())
    return view.requires_grad_()


# --- Plain torch, each operation rounded as it is written ---


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def plain_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return plain_norm(x + residual, weight), x + residual


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, weight, EPS)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_rms_norm(x, residual, weight, EPS)


def exact_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum is rounded to bfloat16 before it is normed, as the operator promises; everything else is exact."""
    total = x + residual
    rounded = total + (total.detach().bfloat16().double() - total.detach())
    return plain_norm(rounded, weight), rounded


def check(ours: Callable[..., object], plain: Callable[..., object], *arguments: Tensor, exact: object = None) -> None:
    check_errors(run(ours, arguments), run(plain, arguments), run(exact or plain, arguments, wide=True))  # type: ignore[arg-type]


# --- Values ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_rms_norm(shape: tuple[int, ...], scale: float) -> None:
    check(norm, plain_norm, normal(*shape, scale=scale), normal(shape[-1], seed=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, ...]) -> None:
    arguments = normal(*shape), normal(*shape, seed=1), normal(shape[-1], seed=2)
    check(add_norm, plain_add_norm, *arguments, exact=exact_add_norm)


@pytest.mark.parametrize("shape", [(1, 2), (3, 66), (17, 64), (2, 3, 130)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_swiglu(shape: tuple[int, ...], scale: float) -> None:
    check(ops.swiglu, plain_swiglu, normal(*shape, scale=scale))


@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(1, 1, 1, 2), (1, 17, 3, 6), (2, 5, 4, 16)])
def test_rope(batch: int, length: int, heads: int, width: int) -> None:
    positions = torch.randint(4000, (batch, length), generator=torch.Generator().manual_seed(5))
    table = ops.Rotary.of(positions, width, 10000.0)
    q, k = normal(batch, length, heads, width), normal(batch, length, 1, width, seed=1)

    def both(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return ops.rope(q, k, table)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(plain_rope(x, table.cos_BSh, table.sin_BSh) for x in (q, k))

    check(both, plain, q, k)


def test_angles_are_llamas() -> None:
    """positions * theta^(-2i/d), as transformers computes its table."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    )
    positions = torch.tensor([[0, 1, 2, 77, 8191]])
    cos, sin = theirs(torch.zeros(1, 5, 64), positions)
    ours = ops.Rotary.of(positions, 16, 5e5)
    torch.testing.assert_close(ours.cos_BSh, cos[..., :8], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.sin_BSh, sin[..., :8], rtol=0, atol=1e-6)


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, gradient of the weighted sum) through autograd."""
    logits = logits.detach().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad((losses * weights.to(losses.dtype)).sum(), logits)
    return losses.detach(), gradient


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 2), (3, 131), (16, 512), (7, 1001)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_cross_entropy(rows: int, vocabulary: int, scale: float) -> None:
    logits = normal(rows, vocabulary, scale=scale).detach()
    draw = torch.Generator().manual_seed(3)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    weights = torch.rand(rows, generator=draw) * 2
    weights[0] = 0.0
    overwritten = logits.clone()
    losses = ops.cross_entropy_(overwritten, targets, weights)
    assert losses.dtype is torch.float32
    exact = weighted_loss(logits.double(), targets, weights.double())
    plain = weighted_loss(logits, targets, weights)
    check_errors([losses.bfloat16(), overwritten], plain, exact)
    # Before it is rounded the loss has the accuracy of float32.
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=1e-5)


# --- Strides ---


def same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for o, e in zip(ours, expected, strict=True):
        assert torch.equal(o, e)


def test_strided_inputs_change_nothing() -> None:
    x, residual, weight = normal(5, 30), normal(5, 30, seed=1), normal(30, seed=2)
    same(run(norm, (strided(x), strided(weight))), run(norm, (x, weight)))
    odd = tuple(strided(a) for a in (x, residual, weight))
    same(run(add_norm, odd), run(add_norm, (x, residual, weight)))
    same(run(ops.swiglu, (strided(x),)), run(ops.swiglu, (x,)))
    same(run(norm, (x.detach().T.contiguous().T.requires_grad_(), weight)), run(norm, (x, weight)))


def test_strided_upstream_gradients_change_nothing() -> None:
    """A gradient that comes in expanded (stride 0) or transposed is read as what it says."""
    x, weight = normal(6, 30), normal(30, seed=2)
    for operation, arguments in ((norm, (x, weight)), (ops.swiglu, (x,))):
        out = operation(*arguments)  # type: ignore[operator]
        expanded = torch.tensor(0.5, dtype=torch.bfloat16).expand_as(out)
        transposed = normal(*out.T.shape).detach().T
        for upstream in (expanded, transposed):
            strange = torch.autograd.grad(out, arguments, upstream, retain_graph=True)
            plain = torch.autograd.grad(out, arguments, upstream.contiguous(), retain_graph=True)
            same(list(strange), list(plain))


def test_rope_of_views_of_one_projection() -> None:
    """q and k are strided views of the fused projection, as in the model; also with several rows and odd strides."""
    table = ops.Rotary.of(torch.arange(7)[None].repeat(2, 1), 8, 10000.0)

    def both(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return ops.rope(q, k, table)

    q, k, _ = normal(2, 7, 5, 8).detach().split((3, 1, 1), dim=2)
    plain = tuple(x.contiguous().requires_grad_() for x in (q, k))
    expected = run(both, plain)
    same(run(both, (q.requires_grad_(), k.requires_grad_())), expected)
    same(run(both, tuple(strided(x) for x in plain)), expected)
    transposed = tuple(x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in plain)
    same(run(both, transposed), expected)


def test_one_table_serves_several_rows() -> None:
    one, q = ops.Rotary.of(torch.arange(7)[None], 8, 10000.0), normal(3, 7, 2, 8)
    several = ops.Rotary.of(torch.arange(7)[None].repeat(3, 1), 8, 10000.0)
    same(list(ops.rope(q, q, one)), list(ops.rope(q, q, several)))


def test_cross_entropy_of_strided_logits() -> None:
    logits = normal(4, 50).detach()
    targets, weights = torch.tensor([3, 0, 49, 7]), torch.tensor([1.0, 0.5, 0.0, 2.0])
    plain, view = logits.clone(), strided(logits).detach()
    expected = ops.cross_entropy_(plain, targets, weights)
    losses = ops.cross_entropy_(view, targets.repeat_interleave(2)[::2], weights.repeat_interleave(2)[::2])
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(view, plain, rtol=2**-7, atol=1e-6)


# --- NaN ---


def table(width: int) -> ops.Rotary:
    return ops.Rotary.of(torch.arange(4)[None], width, 10000.0)


NAN_CASES: dict[str, tuple[Callable[..., object], Callable[..., object], tuple[Tensor, ...]]] = {
    "rms_norm": (norm, plain_norm, (normal(4, 8), normal(8, seed=1))),
    "add_rms_norm": (add_norm, plain_add_norm, (normal(4, 8), normal(4, 8, seed=1), normal(8, seed=2))),
    "swiglu": (ops.swiglu, plain_swiglu, (normal(4, 8),)),
    "rope": (
        lambda x: ops.rope(x, x, table(8))[0],
        lambda x: plain_rope(x, table(8).cos_BSh, table(8).sin_BSh),
        (normal(1, 4, 2, 8),),
    ),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAN_CASES)
def test_what_is_not_finite_stays_visible(name: str, bad: float) -> None:
    """The trainer skips a step by it: wherever float64 has a NaN, so have we, in outputs and in gradients."""
    ours, plain, arguments = NAN_CASES[name]
    for index in range(len(arguments)):
        dirty = [a.detach().clone().requires_grad_() for a in arguments]
        with torch.no_grad():
            dirty[index].view(-1)[3] = bad
        for o, e in zip(run(ours, dirty), run(plain, dirty, wide=True), strict=True):  # type: ignore[arg-type]
            assert torch.equal(o.isfinite(), e.isfinite()), (index, o, e)


@pytest.mark.parametrize("where", ["target", "other", "weight"])
def test_nan_in_cross_entropy(where: str) -> None:
    logits, targets, weights = normal(3, 40).detach(), torch.tensor([5, 6, 7]), torch.ones(3)
    if where == "weight":
        weights[1] = float("nan")
    else:
        logits[1, 6 if where == "target" else 30] = float("nan")
    losses = ops.cross_entropy_(logits, targets, weights)
    assert losses.isnan().tolist() == [False, where != "weight", False]
    assert logits.isnan().all(1).tolist() == [False, True, False]
    assert logits.isnan().any(1).tolist() == [False, True, False]


def test_infinite_logits_give_no_finite_loss() -> None:
    logits = normal(1, 40).detach()
    logits[0, 30] = float("inf")
    losses = ops.cross_entropy_(logits, torch.tensor([5]), torch.ones(1))
    assert not losses.isfinite().any()
    assert logits.isnan().any()


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_KERNELS", "fastest")
    monkeypatch.setattr(ops, "_chosen", None)
    with pytest.raises(UserError, match="LUMINA_KERNELS=fastest"):
        ops.swiglu(normal(2, 4))
