"""What a step leaves behind: numbers in order, a record that may fail, and an end that closes everything."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lumina.config import load
from lumina.train import deferred, loop, step
from lumina.train.agreement import StepSums, pack
from lumina.train.deepspeed import init_process_group
from lumina.train.deferred import Deferred
from lumina.train.outputs.outputs import Outputs, StepFigures


def note(order: list[str], name: str, result: Any = None) -> Any:
    return lambda *given, **named: (order.append(name), result)[1]


def make_run(order: list[str]) -> Any:
    """A run whose parts note what they are asked."""
    phases = ("forward", "backward", "communication", "optimizer")
    split = SimpleNamespace(read=lambda: dict.fromkeys(phases, 0.0), exchanged=0)
    engine = SimpleNamespace(
        gradient_scale=lambda: 1.0,
        exhausted=lambda: None,
        fp16=False,
        figures=(),
        device=torch.device("cpu"),
        set_lr=lambda lr: None,
        accumulate=lambda batch, scale, last: torch.tensor([1.0]),
        take_routing_counts=lambda: None,
        step=note(order, "update", (torch.tensor(2.0), torch.tensor(True))),
        timer=SimpleNamespace(lap=note(order, "lap", split), phase=lambda name: nullcontext()),
    )
    state = SimpleNamespace(
        engine=engine,
        spikes=SimpleNamespace(classify=note(order, "classify")),
        trainer_state=SimpleNamespace(step=4),
        consistent=True,
    )
    return SimpleNamespace(
        folder=Path("run"),
        state=state,
        lock=None,
        config=load("nano", {"layer_stats_every": 1}),
        stragglers=SimpleNamespace(add=note(order, "times")),
        recovery=SimpleNamespace(
            after_update=note(order, "baselines"),
            skips=lambda data: False,
            micro_batches_done=lambda step: None,
            norm_limit=lambda data, loss, corrupt: loss,
        ),
        schedule=lambda step: 0.1,
        watchdog=SimpleNamespace(heartbeat=lambda what: None),
        stop=SimpleNamespace(flags=(0.0, 0.0)),
        saves=SimpleNamespace(flags=(0.0, 0.0, 0.0), before_update=lambda: None, last_begun=0),
        ranks=SimpleNamespace(world=1, rank=0),
        usual_world=1,
        callbacks=SimpleNamespace(before_step=lambda: None, stop_reason=None, failure=None),
        outputs=Outputs(),
        deferred=Deferred(),
        layers=SimpleNamespace(before=note(order, "before"), after=note(order, "after")),
    )


def make_batch() -> Any:
    arrays = {"ids_T": np.zeros(4), "weights_T": np.ones(4), "cu_seqlens_D": np.array([0, 4])}
    return SimpleNamespace(**arrays, part=SimpleNamespace(count=1), torch=lambda: None)


def put(run: Any, flops: float = 0.0, memory: Sequence[float] = (0.0, 0.0)) -> None:
    sums = pack(StepSums(torch.tensor(1.0), flops=flops), torch.device("cpu"))
    sums = torch.cat((sums, torch.tensor(memory, dtype=torch.float64)))
    data: Any = SimpleNamespace(step=4, supervised_tokens=1.0, micro_batches=[make_batch()])
    run.deferred.put(run.state.engine, data, 0.1, sums, torch.tensor(2.0), torch.tensor(True))


def test_the_times_end_before_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are read when the numbers are there: one recorded after them might not have happened."""
    order: list[str] = []
    monkeypatch.setattr(deferred, "Readback", lambda values: order.append("numbers"))
    put(make_run(order))
    assert order == ["lap", "numbers"]


def test_a_record_that_fails_leaves_the_baselines_whole() -> None:
    class Failing(Outputs):
        def step(self, figures: Any) -> None:
            order.append("record")
            raise OSError("planted")

    order: list[str] = []
    run = make_run(order)
    run.outputs = Failing()
    put(run)
    order.clear()
    run.state.engine.exhausted = None
    with pytest.raises(OSError, match="planted"):
        step.record_last(run, wait=True)
    assert order == ["times", "classify", "record", "baselines"]
    assert not run.deferred.pending


def test_work_and_memory_are_those_of_all_ranks() -> None:
    """Ranks that share rows have different work: the output layer is where the answers are."""
    seen: list[StepFigures] = []

    class Seeing(Outputs):
        def step(self, figures: StepFigures) -> None:
            seen.append(figures)

    run = make_run([])
    run.outputs, run.ranks.world = Seeing(), 2
    put(run, flops=10.0, memory=(3.0, 4.0, 7.0, 8.0, 6.0, 9.0))  # three ranks: in use, and there
    step.record_last(run, wait=True)
    assert [(one.flops, one.memory, one.memory_total) for one in seen] == [(5.0, 7, 8)], "of one rank"


@pytest.fixture
def group() -> None:
    """The process group of this process alone, which all test files in it share: DeepSpeed keeps hold of the first."""
    init_process_group()


def test_a_step_counts_once_its_numbers_are_under_way(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer statistics that fail come after: the checkpoint of the emergency has the step's baselines and record."""
    order: list[str] = []
    run = make_run(order)

    def fail() -> None:
        assert run.deferred.pending
        assert (run.state.trainer_state.step, run.state.consistent) == (5, True)
        raise RuntimeError("planted")

    def full(*given: Any) -> None:
        raise RuntimeError("no pinned memory")

    run.layers.after = fail
    data: Any = SimpleNamespace(
        step=4,
        corrupt=[],
        own_samples=np.arange(2),
        samples=np.arange(2),
        micro_batches=[make_batch()],
        supervised_tokens=1.0,
    )
    with pytest.raises(RuntimeError, match="planted"):
        step.take_step(run, data)
    assert order == ["before", "update", "lap"]

    run.state.trainer_state.step, run.deferred = 4, Deferred()
    monkeypatch.setattr(deferred, "Readback", full)
    with pytest.raises(RuntimeError, match="no pinned memory"):
        step.take_step(run, data)
    found = (run.state.trainer_state.step, run.state.consistent)
    assert found == (4, False), "an emergency checkpoint would be of weights half known"


def test_the_end_closes_all_whatever_the_last_record_does(caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []

    class Closing(Outputs):
        def __exit__(self, *given: Any) -> None:
            order.append("outputs")

        def end(self, state: str, step: int, reason: str) -> None:
            order.append(f"{state} at {step}: {reason}")

        def step(self, figures: Any) -> None:
            raise OSError("planted")

    def fail() -> None:
        put(run)
        order.clear()
        raise KeyboardInterrupt

    run = make_run(order)
    run.outputs = Closing()
    run.state.step = 4
    run.callbacks.at_start = fail
    run.saves.stop_waiting = lambda seconds: order.append("saves")
    run.watchdog = type("", (), {"__enter__": lambda s: s, "__exit__": lambda s, *given: order.append("watchdog")})()
    with pytest.raises(KeyboardInterrupt):
        loop.fit(run)
    assert order == [
        "stopped at 4: KeyboardInterrupt: ",
        "times",
        "classify",
        "baselines",
        "watchdog",
        "saves",
        "outputs",
    ]
    assert "planted" in caplog.text
