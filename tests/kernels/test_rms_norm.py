import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lumina.kernels import add_rms_norm, reference, rms_norm

from tests.kernels.kernel_checks import DTYPES, check, strided

norms = importlib.import_module("lumina.kernels.rms_norm_kernels")

EPS = 1e-5
# Widths that divide nothing, rows that fill no block; 513 x 768 makes many programs, the last one ragged. 19 x 5504
# gives programs up to three rows each, which in float32 are loaded one at a time.
SHAPES = [(1, 1), (7, 3), (1, 123), (7, 768), (513, 768), (513, 1024), (7, 2048), (19, 5504), (1, 8192)]
# Past the widest row that one program holds: the two-sweep kernels.
WIDE = [(3, 9001), (2, 33001)]


def arguments(rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    x, residual = (torch.randn(rows, width).to(dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.5 * torch.randn(width)).to(dtype).requires_grad_()
    return [x, residual, weight]


def upstream(rows: int, width: int, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    return [torch.randn(rows, width).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES + WIDE)
def test_norm_and_its_gradients(rows: int, width: int, dtype: torch.dtype) -> None:
    x, _, weight = arguments(rows, width, dtype)
    check(
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: reference.rms_norm(x, w, EPS),
        [x, weight],
        upstream(rows, width, dtype, 1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 123), (513, 256), (7, 1024), (1, 8192), *WIDE])
def test_add_norm_and_its_gradients(rows: int, width: int, dtype: torch.dtype) -> None:
    check(
        lambda x, r, w: add_rms_norm(x, r, w, EPS),
        lambda x, r, w: reference.add_rms_norm(x, r, w, EPS),
        arguments(rows, width, dtype),
        upstream(rows, width, dtype, 2),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(7, 123), (70, 256), (2, 9001)])
def test_a_wider_weight(rows: int, width: int, dtype: torch.dtype) -> None:
    """Gemma's norms multiply by one and their weight, a sum that half precision would round: it comes in float32, and
    so goes its gradient."""
    *rows_, weight = arguments(rows, width, dtype)
    weight = weight.detach().float().add_(1e-4).requires_grad_()
    check(
        lambda x, r, w: add_rms_norm(x, r, w, EPS),
        lambda x, r, w: reference.add_rms_norm(x, r, w, EPS),
        [*rows_, weight],
        upstream(rows, width, dtype, 2),
    )


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 600),
    gap=st.integers(0, 9),
    step=st.integers(1, 3),
    eps=st.sampled_from([1e-12, 1e-6, 1e-2, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_drawn_shapes_strides_and_eps(
    rows: int, width: int, gap: int, step: int, eps: float, scale: float, dtype: torch.dtype
) -> None:
    x, residual, weight = arguments(rows, width, dtype)
    x = strided((x.detach() * scale).requires_grad_(), gap, step)
    residual = strided((residual.detach() * scale).requires_grad_(), gap)
    dy, dsum = (strided(g, gap, step).detach() for g in upstream(rows, width, dtype, 2))
    # Gradients are of the size of dy / rms, whatever cancels in them: a dy of that size makes 1e-6 mean the same for
    # all.
    squares = (x.detach().double() + residual.detach().double()).square().mean(-1)
    unit = 0.3 * min(1.0, (squares.min() + eps).sqrt().item())
    check(
        lambda x, r, w: add_rms_norm(x, r, w, eps),
        lambda x, r, w: reference.add_rms_norm(x, r, w, eps),
        [x, residual, weight],
        [dy * unit, dsum],
    )


def test_leading_dimensions_of_any_stride() -> None:
    x = torch.randn(3, 5, 4, 64)[:, ::2].transpose(1, 2).requires_grad_()
    weight = torch.randn(64).requires_grad_()
    check(
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: reference.rms_norm(x, w, EPS),
        [x, weight],
        [torch.randn(x.shape)],
    )


def test_weight_of_another_type() -> None:
    x = torch.randn(9, 96).bfloat16().requires_grad_()
    weight = torch.randn(96).requires_grad_()
    dy = torch.randn(9, 96).bfloat16()
    check(lambda x, w: rms_norm(x, w, EPS), lambda x, w: reference.rms_norm(x, w, EPS), [x, weight], [dy])


def test_only_one_of_the_two_outputs_is_used() -> None:
    x, residual, weight = arguments(6, 48, torch.float32)
    for use in (0, 1):
        ours = torch.autograd.grad(add_rms_norm(x, residual, weight, EPS)[use].sum(), (x, residual))
        plain = torch.autograd.grad(reference.add_rms_norm(x, residual, weight, EPS)[use].sum(), (x, residual))
        for o, p in zip(ours, plain, strict=True):
            torch.testing.assert_close(o, p)


def test_empty_inputs() -> None:
    x = torch.randn(0, 64).requires_grad_()
    weight = torch.randn(64).requires_grad_()
    y = rms_norm(x, weight, EPS)
    y.sum().backward()
    assert y.shape == (0, 64)
    assert torch.equal(weight.grad, torch.zeros(64))
    normed, total = add_rms_norm(x, x, weight, EPS)
    assert normed.shape == total.shape == (0, 64)


def test_weight_gradients_are_the_same_bits_every_time() -> None:
    x, _, weight = arguments(300, 256, torch.float32)
    dy = torch.randn(300, 256)
    first, second = (torch.autograd.grad(rms_norm(x, weight, EPS), weight, dy)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_float_atomics_anywhere() -> None:
    for name in ("rms_norm_kernels", "rope", "swiglu", "cross_entropy"):
        module = importlib.import_module(f"lumina.kernels.{name}")
        with open(module.__file__, encoding="utf-8") as file:
            assert "atomic" not in file.read(), name


@pytest.mark.parametrize("rows", [1, 31, 2048, 4096, 8192, 10**6])
def test_backward_programs(rows: int) -> None:
    """No program without rows, and the partials' traffic stays below 5% of 6 bytes where rows are many."""
    partials = norms.num_partials(rows, 4, 132)
    assert 1 <= partials <= -(-rows // 4)
    assert partials <= 2 * 132
    if rows >= 4096:
        assert partials * 8 / rows <= 0.05 * 6
