"""The timing of device work, on a device that is made up: a host and a device with a clock each.

The claim is that the host's time never enters a figure, whatever a launch costs it; so it is set to four hundred times
the device's.
"""

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from lumina.kernels import timing

LAUNCH, WORK, REPLAY = 2e-3, 5e-6, 30e-6


@dataclass
class Card:
    """Seconds at which the host and the device are; `recorded` collects a graph's launches."""

    capturable: bool = True
    waits: bool = False  # every step waits for the device, as `.item()` does
    host: float = 0.0
    device: float = 0.0
    recorded: list[float] | None = None
    delays: list[int] = field(default_factory=list)
    alive: int = 0
    most_alive: int = 0

    def step(self) -> object:
        self.host += LAUNCH
        if self.recorded is not None:
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.recorded.append(WORK)
        else:
            self.run(WORK)
        if self.waits:
            self.host = max(self.host, self.device)
        return Result(self)

    def run(self, seconds: float) -> None:
        self.device = max(self.host, self.device) + seconds

    def sleep(self, cycles: int) -> None:
        self.delays.append(cycles)
        self.run(cycles / 2e9)


class Result:
    """A step's result: how many are alive at once is counted."""

    def __init__(self, card: Card) -> None:
        self.card = card
        card.alive += 1
        card.most_alive = max(card.most_alive, card.alive)

    def __del__(self) -> None:
        self.card.alive -= 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = max(card.host, card.device)

        def query(self) -> bool:
            return card.host >= self.at

        def synchronize(self) -> None:
            card.host = max(card.host, self.at)

        def elapsed_time(self, other: "Event") -> float:
            return (other.at - self.at) * 1e3

    class Graph:
        def replay(self) -> None:
            card.host += REPLAY
            card.run(sum(self.launches))

    @contextlib.contextmanager
    def capture(graph: Graph, stream: object):
        card.recorded = []
        try:
            yield
            graph.launches = card.recorded
        finally:
            card.recorded = None

    def wait(*_: object) -> None:
        card.host = max(card.host, card.device)

    stream = SimpleNamespace(wait_stream=wait, synchronize=wait)
    changes = {
        "Stream": lambda *_: stream,
        "current_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": wait,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "_sleep": card.sleep,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=50 * 2**20),
    }
    for name, value in changes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return card


def test_a_replayed_graph_tells_the_devices_time(card: Card) -> None:
    timed = timing.device_seconds(lambda: card.step, 8 * 2**20, "cuda", 5)
    assert timed.seconds == pytest.approx(WORK)
    assert (timed.how, timed.rounds) == (timing.GRAPH, 5)


def test_what_cannot_be_captured_is_queued_behind_a_delay(card: Card) -> None:
    card.capturable = False
    timed = timing.device_seconds(lambda: card.step, 8 * 2**20, "cuda", 5)
    assert timed.seconds == pytest.approx(WORK)
    assert timed.how == timing.QUEUE
    assert card.delays[-1] > card.delays[0]  # ten milliseconds were too few for the host to be ahead


def test_a_step_that_waits_for_the_device_is_marked(card: Card) -> None:
    card.capturable, card.waits = False, True
    timed = timing.device_seconds(lambda: card.step, 8 * 2**20, "cuda", 5)
    assert timed.how == timing.SYNCED
    assert timed.seconds == pytest.approx(LAUNCH + WORK, rel=0.01)
    assert max(card.delays) <= 16 * card.delays[0]  # and the search for a delay was short


@pytest.mark.parametrize("size", [2**19, 8 * 2**20, 2**30])
def test_a_round_passes_the_cache_and_every_result_has_its_own_memory(card: Card, size: int) -> None:
    made = 0

    def make() -> timing.Step:
        nonlocal made
        made += 1
        return card.step

    timed = timing.device_seconds(make, size, "cuda", 3)
    assert made * size == timed.touched > 2 * timed.cache
    assert timed.past_cache
    assert card.most_alive >= max(made, timing.FEWEST)


def test_a_round_that_stays_in_the_cache_says_so(card: Card) -> None:
    assert not timing.device_seconds(lambda: card.step, 2**10, "cuda", 3).past_cache  # more launches than a graph gets
    card.capturable = False
    assert not timing.device_seconds(lambda: card.step, 2**20, "cuda", 3).past_cache  # more than a queue takes


def test_tiles_are_compared_by_the_devices_time(card: Card) -> None:
    assert timing.milliseconds_of_launch(card.step) == pytest.approx(WORK * 1e3)


def test_a_cpu_has_the_wall_clock() -> None:
    timed = timing.copy_time(2**16, "cpu", 4)
    assert (timed.how, timed.rounds) == (timing.WALL, 4)
    assert timed.seconds > 0
