import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lumina.kernels import reference, swiglu

from tests.kernels.kernel_checks import DTYPES, check, strided


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (7, 3), (513, 123), (7, 768), (33, 1408), (7, 2752), (7, 5504), (1, 8192), (1, 65536)]
)
def test_product_and_its_gradient(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(rows, 2 * width).to(dtype).requires_grad_()
    check(swiglu, reference.swiglu, [gate_up], [torch.randn(rows, width).to(dtype)])


@settings(max_examples=20)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 400),
    gap=st.integers(0, 9),
    step=st.integers(1, 2),
    scale=st.sampled_from([1e-2, 1.0, 8.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_drawn_shapes_and_strides(rows: int, width: int, gap: int, step: int, scale: float, dtype: torch.dtype) -> None:
    gate_up = strided((scale * torch.randn(rows, 2 * width)).to(dtype).requires_grad_(), gap, step)
    dh = strided(torch.randn(rows, width).to(dtype), gap, step)
    check(swiglu, reference.swiglu, [gate_up], [dh])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gates_do_not_overflow(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    gate_up = torch.cat((gate, torch.ones(7))).to(dtype).view(1, -1).requires_grad_()
    check(swiglu, reference.swiglu, [gate_up], [torch.ones(1, 7, dtype=dtype)])


def test_leading_dimensions() -> None:
    gate_up = torch.randn(2, 3, 4, 32).transpose(0, 2).requires_grad_()
    check(swiglu, reference.swiglu, [gate_up], [torch.randn(4, 3, 2, 16)])


def test_empty_and_refusals() -> None:
    assert swiglu(torch.randn(0, 8)).shape == (0, 4)
    assert swiglu(torch.randn(3, 0)).shape == (3, 0)
    with pytest.raises(ValueError, match="odd width 7"):
        swiglu(torch.randn(3, 7))
    with pytest.raises(TypeError, match="float64"):
        swiglu(torch.randn(3, 8).double())
