"""Marks of a step's passes: where they are made, and on a device that is behind its host, when they count."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from lumina.train.deepspeed import Engine
from lumina.train.liveness.progress import Progress
from tests.train.tiny_engines import arrays, make_engine


@pytest.fixture(params=[(0, 0), (3, 1)], ids=["ZeRO 0", "ZeRO 3, recomputed"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    stage, every = request.param
    made = make_engine(stage)
    made.model.checkpoint_every = every
    yield made
    made.close()


class Event:
    """What a device comes past when the test says so."""

    def __init__(self, number: int) -> None:
        self.number = number

    def query(self) -> bool:
        return self.number < Event.reached

    reached = 0


def test_every_layer_leaves_a_mark_forward_and_backward(engine: Engine) -> None:
    made: list[int] = []

    def record() -> Event:
        made.append(len(made))
        return Event(made[-1])

    progress, found = Progress(record), []
    progress.follow(engine)
    engine.accumulate(arrays(0).torch(), 1.0, last=True)
    for Event.reached in range(1, len(made) + 1):
        found.append(progress.newest()[1])
    forward = [f"the forward pass of layer {layer}" for layer in (0, 1)]
    assert found == [*forward, "the backward pass of the output layer", "the backward pass of layer 1"]


def test_a_mark_counts_when_the_device_has_come_past_it() -> None:
    events = iter(Event(number) for number in range(3))
    progress, Event.reached = Progress(lambda: next(events)), 0
    for what in ("a", "b", "c"):
        progress.mark(what)
    assert progress.newest() == (0.0, "")
    Event.reached = 2
    began = time.monotonic()
    when, what = progress.newest()
    assert what == "b"
    assert when >= began
    assert progress.newest() == (when, "b"), "nothing new"


def test_without_a_device_a_mark_counts_at_once_and_a_captured_one_never() -> None:
    progress = Progress()
    progress.mark("a")
    assert progress.newest()[1] == "a"
    captured = Progress(lambda: None)
    captured.mark("a")
    assert captured.newest() == (0.0, "")


def test_a_device_that_failed_is_not_asked_again() -> None:
    class Failed:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    progress = Progress(Failed)
    progress.mark("a")
    assert progress.newest() == progress.newest() == (0.0, "")
