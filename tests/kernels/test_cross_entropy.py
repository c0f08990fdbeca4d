import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lumina.kernels import cross_entropy_, reference

from tests.kernels.kernel_checks import DTYPES, check_errors


def compare(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
    """Losses and in-place gradients of the kernel and of plain torch in the same type, against float64 autograd."""
    exact = logits.double().requires_grad_()
    keep = (weights != 0) & (targets >= 0)
    losses = torch.where(keep, F.cross_entropy(exact, targets.clamp(min=0), reduction="none"), 0.0)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), exact)
    results = []
    for function in (cross_entropy_, reference.cross_entropy_):
        given = logits.clone()
        results.append((function(given, targets, weights), given))
    check_errors(*results, (losses.detach(), gradient))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 3), (7, 123), (33, 768), (5, 16384), (5, 20001), (2, 100352)])
def test_losses_and_gradients(rows: int, width: int, dtype: torch.dtype) -> None:
    compare((3 * torch.randn(rows, width)).to(dtype), torch.randint(0, width, (rows,)), torch.rand(rows))


@settings(max_examples=20)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 700),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_drawn_rows_with_ignored_and_weightless_ones(
    rows: int, width: int, scale: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    some = {"min_size": rows, "max_size": rows}
    targets = torch.tensor(data.draw(st.lists(st.integers(-2, width - 1), **some)))
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), **some)))
    compare((scale * torch.randn(rows, width)).to(dtype), targets, weights)


def test_rising_and_falling_rows() -> None:
    """The running maximum changes at every step, or never again after the first."""
    rising = torch.linspace(-80, 80, 40000).expand(2, -1).clone()
    rising[1] = rising[1].flip(0)
    compare(rising, torch.tensor([39999, 3]), torch.ones(2))


def test_infinitely_unlikely_words() -> None:
    logits = torch.randn(3, 50000)
    logits[:, 7:40000] = float("-inf")
    compare(logits, torch.tensor([0, 3, 49999]), torch.ones(3))


def test_strided_logits_leave_their_neighbours_alone() -> None:
    store = torch.randn(4, 300)
    before = store.clone()
    compare(store[:, 3:203], torch.tensor([0, 5, -1, 199]), torch.tensor([1.0, 0.0, 1.0, 2.0]))
    cross_entropy_(store[:, 3:203], torch.tensor([0, 5, -1, 199]), torch.tensor([1.0, 0.0, 1.0, 2.0]))
    assert torch.equal(store[:, :3], before[:, :3])
    assert torch.equal(store[:, 203:], before[:, 203:])
    assert not store[1:3, 3:203].any()


def test_target_outside_the_vocabulary_is_nan() -> None:
    losses = cross_entropy_(torch.randn(2, 10), torch.tensor([10, 3]), torch.ones(2))
    assert losses[0].isnan()
    assert losses[1].isfinite()


def test_empty_and_refusals() -> None:
    assert cross_entropy_(torch.randn(0, 9), torch.zeros(0, dtype=torch.int64), torch.zeros(0)).shape == (0,)
    targets, weights = torch.tensor([0, 1]), torch.ones(2)
    with pytest.raises(ValueError, match="unit stride"):
        cross_entropy_(torch.randn(9, 2).t(), targets, weights)
    with pytest.raises(ValueError, match="logits"):
        cross_entropy_(torch.randn(3, 9), targets, weights)
    with pytest.raises(RuntimeError, match="outside autograd"):
        cross_entropy_(torch.randn(2, 9).requires_grad_(), targets, weights)
