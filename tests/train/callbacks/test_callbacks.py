"""What callbacks are called with, and what they must leave as it was: each change is noticed and names the callback."""

from __future__ import annotations

import random
from collections.abc import Callable as Function
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lumina.data import GlobalOrder
from lumina.train.callbacks import Callback, CallbackError, Callbacks, Context, StepResult
from lumina.train.deepspeed import Ranks, init_process_group
from lumina.train.outcomes import Stop, StopKind
from lumina.train.outputs.outputs import Outputs

RESULT = StepResult(5, 2.0, 1e-3, 0.5, True, 64, 32)


class Kept(Outputs):
    """Keeps what callbacks log."""

    def __init__(self) -> None:
        self.values: list[tuple[int, dict[str, float]]] = []

    def callback_values(self, step: int, values: Any) -> None:
        self.values.append((step, dict(values)))


class Setting:
    """A trained parameter with its gradient and moments, and the callbacks around them, on one rank."""

    def __init__(self, folder: Path, *callbacks: Callback) -> None:
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.model(torch.ones(3)).sum().backward()
        self.optimizer.step()
        self.order = GlobalOrder(10, 2, 1234, "data")
        self.state: Any = SimpleNamespace(
            engine=SimpleNamespace(model=self.model, optimizer=self.optimizer), step=4, consistent=True
        )
        self.outputs, self.requests = Kept(), [0]
        ranks = Ranks(0, 1, 0, 1)
        self.called: list[str] = []
        self.callbacks = Callbacks(
            callbacks, ranks, folder, 9, self.state, self.order, self.outputs, self.request, self.called.append
        )

    def request(self) -> None:
        self.requests[0] += 1


@pytest.fixture(autouse=True, scope="module")
def group() -> None:
    """The process group of this process alone, which all test files in it share: DeepSpeed keeps hold of the first."""
    init_process_group()


class Noting(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def at_start(self, context: Context) -> None:
        self.seen.append(("at_start", context.step, context.total_steps, context.rank, context.world))

    def before_step(self, context: Context) -> None:
        self.seen.append(("before_step", context.step))

    def after_step(self, context: Context, result: StepResult) -> None:
        self.seen.append(("after_step", result.loss))

    def at_evaluation(self, context: Context, loss: float) -> None:
        self.seen.append(("at_evaluation", loss))

    def at_save(self, context: Context, path: Path) -> None:
        self.seen.append(("at_save", path.name))

    def at_end(self, context: Context, stop: Stop) -> None:
        self.seen.append(("at_end", stop.kind))


def test_each_point_is_told_with_what_belongs_to_it(tmp_path: Path) -> None:
    noting = Noting()
    callbacks = Setting(tmp_path, noting).callbacks
    callbacks.at_start()
    callbacks.before_step()
    callbacks.after_step(RESULT)
    callbacks.at_evaluation(1.5)
    callbacks.at_save(tmp_path / "step-00000004")
    callbacks.at_end(Stop(StopKind.SIGNAL))
    assert noting.seen == [
        ("at_start", 4, 9, 0, 1),
        ("before_step", 4),
        ("after_step", 2.0),
        ("at_evaluation", 1.5),
        ("at_save", "step-00000004"),
        ("at_end", StopKind.SIGNAL),
    ]


class Doing(Callback):
    """Does one thing after a step."""

    def __init__(self, what: Function[[Context], None]) -> None:
        self.what = what

    def after_step(self, context: Context, result: StepResult) -> None:
        self.what(context)


def scale_data(setting: Setting) -> None:
    setting.model.weight.data.mul_(2)


def scale(setting: Setting) -> None:
    with torch.no_grad():
        setting.model.weight.mul_(2)


def replace(setting: Setting) -> None:
    setting.model.weight.data = torch.zeros(2, 3)


def fill_gradient(setting: Setting) -> None:
    assert setting.model.bias.grad is not None
    setting.model.bias.grad.data.zero_()


def drop_gradient(setting: Setting) -> None:
    setting.model.bias.grad = None


def scale_moments(setting: Setting) -> None:
    torch._foreach_mul_([setting.optimizer.state[setting.model.weight]["exp_avg"].data], 2.0)


def raise_rate(setting: Setting) -> None:
    setting.optimizer.param_groups[0]["lr"] = 1.0


def set_decay(setting: Setting) -> None:
    setting.optimizer.param_groups[0]["weight_decay"] = 1.0


def draw(setting: Setting) -> None:
    torch.rand(1)


def reseed_order(setting: Setting) -> None:
    setting.order.seed = 99


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (scale, "weights"),
        (scale_data, "weights"),
        (replace, "weights"),
        (fill_gradient, "gradients"),
        (drop_gradient, "gradients"),
        (scale_moments, "the optimizer's moments"),
        (raise_rate, "the learning rate"),
        (set_decay, "the optimizer's settings"),
        (draw, "torch's random state"),
        (reseed_order, "the order of the samples"),
    ],
)
def test_a_change_is_noticed_and_named(change: Function[[Setting], None], named: str, tmp_path: Path) -> None:
    setting = Setting(tmp_path, Doing(lambda context: change(setting)))
    setting.callbacks.at_start()
    with pytest.raises(CallbackError, match=rf"step 4: the callback Doing.after_step changed {named}") as raised:
        setting.callbacks.after_step(RESULT)
    assert "Nothing was saved" in str(raised.value.remedy)
    assert not setting.state.consistent, "an emergency checkpoint would hold what was changed"


def test_a_change_is_noticed_though_the_callback_raises(tmp_path: Path) -> None:
    def both(context: Context) -> None:
        scale_data(setting)
        raise ValueError("planted")

    setting = Setting(tmp_path, Doing(both))
    with pytest.raises(CallbackError, match="changed weights"):
        setting.callbacks.after_step(RESULT)


def test_what_is_its_own_a_callback_may_change(tmp_path: Path) -> None:
    total = torch.zeros(3)
    own = torch.Generator().manual_seed(1)

    def work(context: Context) -> None:
        total.add_(torch.ones(3)).mul_(2)
        torch.rand(3, generator=own)
        np.random.default_rng().random()
        random.random()
        setting.model.weight.detach().clone().mul_(3)  # reads the weights, writes to a copy

    setting = Setting(tmp_path, Doing(work))
    setting.callbacks.at_start()
    setting.callbacks.after_step(RESULT)
    setting.callbacks.at_end(Stop(StopKind.FINISHED))
    assert setting.called == ["callback Doing.after_step"], "points that are not overridden cost nothing"


def test_what_a_step_logs_is_one_record(tmp_path: Path) -> None:
    """A tracker takes one record of a kind and step."""

    def log(context: Context) -> None:
        context.log("a", context.step)
        context.log("b", 2)

    setting = Setting(tmp_path, Doing(log), Doing(lambda context: context.log("c", 3)))
    setting.callbacks.after_step(RESULT)
    assert setting.outputs.values == []
    setting.state.step = 5
    setting.callbacks.before_step()
    setting.callbacks.after_step(RESULT)
    setting.callbacks.at_end(Stop(StopKind.FINISHED))
    assert setting.outputs.values == [(4, {"a": 4, "b": 2, "c": 3}), (5, {"a": 5, "b": 2, "c": 3})]


def test_requests_are_kept_until_the_ranks_agree(tmp_path: Path) -> None:
    def ask(context: Context) -> None:
        context.request_checkpoint()
        context.stop("enough")
        context.stop("more than enough")

    setting = Setting(tmp_path, Doing(ask))
    assert setting.callbacks.stop_reason is None
    setting.callbacks.after_step(RESULT)
    assert (setting.callbacks.stop_reason, setting.requests) == ("enough", [1])
    assert setting.callbacks.agreed_reason() == "enough"


def test_an_exception_is_a_failure_with_the_callbacks_name(tmp_path: Path) -> None:
    def fail(context: Context) -> None:
        raise ZeroDivisionError("planted")

    calls: list[int] = []
    setting = Setting(tmp_path, Doing(fail), Doing(lambda context: calls.append(1)))
    setting.callbacks.at_start()
    setting.callbacks.after_step(RESULT)
    setting.callbacks.after_step(RESULT)
    assert calls == [], "after a failure no callback is called"
    failure = "rank 0: Doing.after_step raised ZeroDivisionError: planted"
    assert failure in str(setting.callbacks.agreed_failure())
    with pytest.raises(CallbackError, match=failure):
        setting.callbacks.at_end(Stop(StopKind.FINISHED))
    assert setting.state.consistent, "the run is saved"


def test_an_exception_at_the_start_ends_the_run_there(tmp_path: Path) -> None:
    class Failing(Callback):
        def at_start(self, context: Context) -> None:
            raise OSError("planted")

    with pytest.raises(CallbackError, match=r"rank 0: Failing\.at_start raised OSError: planted"):
        Setting(tmp_path, Failing()).callbacks.at_start()
