"""Passes before the training are watched as those of a step are, and nothing is afterwards."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from lumina.cluster import StopRequest
from lumina.train.liveness.watchdog import Watchdog
from lumina.train.liveness.watching import watched_evaluation
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
