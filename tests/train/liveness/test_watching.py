"""Passes before the training are watched as those of a step are, and nothing is afterwards."""

from __future__ import annotations

import weakref
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from lumina.cluster import StopRequest
from lumina.train.deepspeed.timing import StepTimer
from lumina.train.liveness.watchdog import Watchdog
from lumina.train.liveness.watching import beat_between_passes, watched_evaluation
from tests.train.tiny_engines import arrays, make_engine


def collective_timeout() -> timedelta:
    assert dist.group.WORLD is not None
    found: timedelta = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    return found


def test_a_pass_before_the_training_is_progress_and_may_take_hours() -> None:
    engine, watchdog = make_engine(2), Watchdog(600.0, 0.0, StopRequest(), 0)
    usual = collective_timeout()
    assert usual < timedelta(hours=1)
    for _ in range(2):  # the data to train on, and that to evaluate on
        before = watchdog.progress.newest()[0]
        with watched_evaluation(watchdog, engine):
            assert collective_timeout() > timedelta(days=1)
            assert not engine.model.training
            engine.loss(arrays(0).torch())
        when, what = watchdog.progress.newest()
        assert when > before
        assert what == "the forward pass of layer 1"
        assert engine.model.training
        assert collective_timeout() == usual
    engine.close()


def test_what_is_measured_of_passes_before_the_training_is_let_go_of() -> None:
    """On a GPU an event at each exchange of each layer, of a whole data set."""
    made: list[weakref.ref[Event]] = []

    class Event:
        def __init__(self) -> None:
            made.append(weakref.ref(self))

    watchdog, timer = Watchdog(600.0, 0.0, StopRequest(), 0), StepTimer(torch.device("cuda"), Event)
    engine: Any = SimpleNamespace(timer=timer)
    for _ in range(5):
        beat_between_passes(watchdog, engine, "a pass")
        for _ in range(10):
            with timer.phase("exchange"):
                pass
    assert len(made) > 100
    assert sum(event() is not None for event in made) < 25, "those of one pass"
