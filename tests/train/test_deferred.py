"""What a step leaves behind: numbers in order, a record that may fail, and an end that closes everything."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lumina.train import deferred, loop
from lumina.train.deferred import Deferred
from lumina.train.run import Run


def make_run(order: list[str]) -> Any:
    """A run whose parts note what they are asked."""

    def note(name: str, result: Any = None) -> Any:
        return lambda *given, **named: (order.append(name), result)[1]

    split = SimpleNamespace(read=lambda: dict.fromkeys(("forward", "backward", "communication", "optimizer"), 0.0))
    engine = SimpleNamespace(
        gradient_scale=lambda: 1.0,
        exhausted=lambda: None,
        fp16=False,
        step=note("update", (torch.tensor(2.0), torch.tensor(True))),
        timer=SimpleNamespace(lap=note("lap", split), phase=lambda name: nullcontext()),
    )
    return SimpleNamespace(
        engine=engine,
        stragglers=SimpleNamespace(add=note("times")),
        answers=SimpleNamespace(judge=note("judge"), after_update=note("baselines")),
    )


def put(run: Any) -> Deferred:
    made = Deferred(run)
    shared = torch.arange(10, dtype=torch.float64)
    made.put(SimpleNamespace(step=4), 0.1, shared, torch.tensor(2.0), torch.tensor(True))  # type: ignore[arg-type]
    return made


def test_the_times_end_before_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are read when the numbers are there: one recorded after them might not have happened."""
    order: list[str] = []
    monkeypatch.setattr(deferred, "Readback", lambda values: order.append("numbers"))
    put(make_run(order))
    assert order == ["lap", "numbers"]


def test_a_record_that_fails_leaves_the_baselines_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        order.append("record")
        raise OSError("planted")

    order: list[str] = []
    monkeypatch.setattr(deferred, "record_step", fail)
    made = put(make_run(order))
    order.clear()
    with pytest.raises(OSError, match="planted"):
        made.note(wait=True)
    assert order == ["times", "judge", "record", "baselines"]
    assert not made.pending


def test_a_step_counts_once_its_numbers_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer statistics that fail come after: the checkpoint of the emergency has the step's baselines and record."""
    order: list[str] = []
    run = make_run(order)

    def fail() -> None:
        assert run.deferred.pending
        assert (run.progress.step, run.sound) == (5, True)
        raise RuntimeError("planted")

    def full(*given: Any) -> None:
        raise RuntimeError("no pinned memory")

    loss = torch.tensor(1.0)
    monkeypatch.setattr(loop, "_accumulate", lambda run, data: (loss, None))
    monkeypatch.setattr(loop.dist, "all_reduce", lambda tensor: None)
    vars(run).update(
        {
            "schedule": lambda step: 0.1,
            "watchdog": SimpleNamespace(beat=lambda what: None),
            "stop": SimpleNamespace(flags=(0.0, 0.0)),
            "saves": SimpleNamespace(flags=(0.0, 0.0, 0.0), before_update=lambda: None),
            "ranks": SimpleNamespace(world=1),
            "progress": SimpleNamespace(step=4),
            "sound": True,
            "layer_stats": lambda step: SimpleNamespace(before=lambda: order.append("before"), after=fail),
            "record_layers": lambda *given: None,
        }
    )
    run.engine.set_lr = lambda lr: None
    run.answers.passes = lambda step: False
    run.answers.limit = lambda loss: loss
    data: Any = SimpleNamespace(step=4, corrupt=[], own_samples=np.arange(2), samples=np.arange(2))
    run.deferred = Deferred(run)
    with pytest.raises(RuntimeError, match="planted"):
        loop._step(run, data)
    assert order == ["before", "update", "lap"]

    run.progress.step, run.deferred = 4, Deferred(run)
    monkeypatch.setattr(deferred, "Readback", full)
    with pytest.raises(RuntimeError, match="no pinned memory"):
        loop._step(run, data)
    assert (run.progress.step, run.sound) == (4, False), "an emergency checkpoint would be of weights half known"


def test_the_end_closes_all_whatever_the_last_record_does(caplog: pytest.LogCaptureFixture) -> None:
    closed = []

    def fail(wait: bool) -> None:
        raise OSError("planted")

    def part(name: str) -> Any:
        return SimpleNamespace(__exit__=lambda *given: closed.append(name))

    run: Any = SimpleNamespace(
        deferred=SimpleNamespace(note=fail),
        watchdog=part("watchdog"),
        console=part("console"),
        saves=SimpleNamespace(stop_waiting=lambda seconds: closed.append("saves")),
        machine=SimpleNamespace(close=lambda: closed.append("machine")),
        metrics=None,
    )
    Run.__exit__(run, RuntimeError, RuntimeError("what ended the run"), None)
    assert closed == ["watchdog", "console", "saves", "machine"]
    assert "planted" in caplog.text
