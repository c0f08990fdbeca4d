"""The schedules against torch's own, at every step of runs of any length and warm-up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as theirs

from lumina.config import OptimConfig
from lumina.train.schedules import schedule

drawn = settings(max_examples=80, deadline=None, derandomize=True, database=None)
steps = st.integers(1, 120)
ratios = st.floats(0.0, 1.0)
peaks = st.floats(1e-6, 1.0)


def rates(kind: str, total: int, **changes: Any) -> list[float]:
    found = schedule(OptimConfig(lr_scheduler=kind, **changes), total)  # type: ignore[arg-type]
    return [found(step) for step in range(total)]


def torch_rates(total: int, peak: float, make: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
    """What torch's scheduler sets before each of `total` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR warns about its own use of step(epoch)
        scheduler = make(optimizer)
        found = []
        for _ in range(total):
            found.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
    return found


def after_warmup(
    total: int, warmup: int, decay: Callable[[torch.optim.Optimizer, int], Any]
) -> Callable[[torch.optim.Optimizer], Any]:
    """A linear rise over `warmup` steps, then `decay` over the rest, composed of torch's schedulers."""

    def make(optimizer: torch.optim.Optimizer) -> Any:
        after = decay(optimizer, max(1, total - 1 - warmup))
        if warmup == 0:
            return after
        rise = theirs.LambdaLR(optimizer, lambda step: (step + 1) / warmup)
        return theirs.SequentialLR(optimizer, [rise, after], milestones=[warmup])

    return make


@drawn
@given(total=steps, ratio=ratios, peak=peaks, floor=st.floats(0.0, 1.0))
@example(total=1, ratio=0.0, peak=1e-3, floor=0.1)
@example(total=1, ratio=1.0, peak=1e-3, floor=0.1)
@example(total=100, ratio=0.1, peak=1e-4, floor=0.01)
def test_cosine(total: int, ratio: float, peak: float, floor: float) -> None:
    low, warmup = floor * peak, round(ratio * total)

    def decay(optimizer: torch.optim.Optimizer, length: int) -> Any:
        return theirs.CosineAnnealingLR(optimizer, T_max=length, eta_min=low)

    ours = rates("cosine", total, learning_rate=peak, min_lr=low, warmup_ratio=ratio)
    assert ours == pytest.approx(torch_rates(total, peak, after_warmup(total, warmup, decay)), rel=1e-6, abs=1e-12)


@drawn
@given(total=steps, ratio=ratios, peak=peaks, floor=st.floats(0.0, 1.0))
def test_linear(total: int, ratio: float, peak: float, floor: float) -> None:
    warmup = round(ratio * total)

    def decay(optimizer: torch.optim.Optimizer, length: int) -> Any:
        return theirs.LinearLR(optimizer, start_factor=1.0, end_factor=floor, total_iters=length)

    ours = rates("linear", total, learning_rate=peak, min_lr=floor * peak, warmup_ratio=ratio)
    assert ours == pytest.approx(
        torch_rates(total, peak, after_warmup(total, warmup, decay)), rel=1e-6, abs=1e-9 * peak
    )


@drawn
@given(total=steps, ratio=ratios, peak=peaks)
def test_constant(total: int, ratio: float, peak: float) -> None:
    warmup = round(ratio * total)

    def decay(optimizer: torch.optim.Optimizer, length: int) -> Any:
        return theirs.ConstantLR(optimizer, factor=1.0, total_iters=0)

    ours = rates("constant", total, learning_rate=peak, min_lr=0.0, warmup_ratio=ratio)
    assert ours == pytest.approx(torch_rates(total, peak, after_warmup(total, warmup, decay)), rel=1e-9)


@drawn
@given(total=steps, ratio=ratios, peak=peaks)
@example(total=5, ratio=0.1, peak=1e-3)
@example(total=40, ratio=0.0, peak=1e-3)
@example(total=40, ratio=1.0, peak=1e-3)
@example(total=1, ratio=0.5, peak=1e-3)
@example(total=1, ratio=1 - 1e-12, peak=1.0)  # a rise that ends just before the only step
def test_onecycle(total: int, ratio: float, peak: float) -> None:
    def exact(optimizer: torch.optim.Optimizer) -> Any:
        return theirs.OneCycleLR(optimizer, max_lr=peak, total_steps=total, pct_start=ratio, cycle_momentum=False)

    ours = rates("onecycle", total, learning_rate=peak, min_lr=0.0, warmup_ratio=ratio)
    try:
        expected = onecycle(total, peak, exact)
    except ZeroDivisionError:  # torch divides by nothing where a phase has no length; we must have a rate
        assert all(0 < rate <= peak * (1 + 1e-12) for rate in ours)
        return
    assert ours == pytest.approx(expected, rel=1e-9)


def onecycle(total: int, peak: float, make: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
    """OneCycleLR may be stepped only `total` - 1 times."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
        found = [float(optimizer.param_groups[0]["lr"])]
        for _ in range(total - 1):
            optimizer.step()
            scheduler.step()
            found.append(float(optimizer.param_groups[0]["lr"]))
    return found


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_ends(kind: str) -> None:
    """Peak where the warm-up ends, min_lr at the last step, and a first step that is not zero."""
    found = rates(kind, 200, learning_rate=1e-3, min_lr=1e-5, warmup_ratio=0.1)
    assert found[0] == pytest.approx(1e-3 / 20)
    assert found[19] == found[20] == max(found) == pytest.approx(1e-3)
    assert found[-1] == pytest.approx(1e-5)
    assert found[:20] == sorted(found[:20])
    assert found[20:] == sorted(found[20:], reverse=True)


def test_steps_past_the_end_stay_at_the_floor() -> None:
    """A run that goes on past its planned end (max_steps raised) does not swing up again."""
    for kind in ("cosine", "linear"):
        assert schedule(OptimConfig(lr_scheduler=kind), 100)(250) == pytest.approx(1e-6)  # type: ignore[arg-type]


@drawn
@given(kind=st.sampled_from(["cosine", "linear", "constant", "onecycle"]), total=steps, ratio=ratios)
def test_a_rate_is_a_pure_function_of_the_step(kind: str, total: int, ratio: float) -> None:
    """Asked in any order, from a schedule made anew: resuming needs no state."""
    config = OptimConfig(lr_scheduler=kind, warmup_ratio=ratio)  # type: ignore[arg-type]
    forward = rates(kind, total, warmup_ratio=ratio)
    backward = [schedule(config, total)(step) for step in reversed(range(total))]
    assert forward == backward[::-1]
    assert all(0 < rate <= 1e-4 * (1 + 1e-12) for rate in forward)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "onecycle"])
@pytest.mark.parametrize("rise", [0.0, 0.25])
def test_after_the_last_step_the_rate_stays(kind: str, rise: float) -> None:
    """A run may go on past its length."""
    found = schedule(OptimConfig(lr_scheduler=kind, warmup_ratio=rise), 8)
    assert [found(step) for step in (8, 9, 50)] == pytest.approx([found(7)] * 3, rel=1e-12)


def test_onecycle_ends_after_a_run_that_was_all_rise() -> None:
    found = schedule(OptimConfig(lr_scheduler="onecycle", warmup_ratio=1.0, learning_rate=0.5), 8)
    assert [found(step) for step in (8, 50)] == pytest.approx([0.5 / 25 / 1e4] * 2, rel=1e-12)


def test_onecycle_begins_at_its_peak_where_the_rise_is_one_step() -> None:
    """torch divides by zero there."""
    assert schedule(OptimConfig(lr_scheduler="onecycle", warmup_ratio=0.25, learning_rate=0.5), 4)(0) == 0.5
