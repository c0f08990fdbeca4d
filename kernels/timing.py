"""Device time of short work, not the host's: CUDA-graph replay, or launches queued behind a delay of the device.

One synchronised call of a kernel of 5 us takes 20 to 200: what its launch costs the host. Here a round of many steps is
captured as one CUDA graph, and a replay is timed between two events. What cannot be captured is queued while the device
is kept busy by a delay, and counts only if the device had not yet begun when the last step was queued. A step that
waits for the device itself, as Liger's cross entropies do with `.item()`, has no time but the one with its waits in it,
and is marked.

Every step of a round works on memory of its own, inputs and results, and a round touches more than twice the L2: no
side reads what the cache still holds, and no result is overwritten before it has been written to memory.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]

GRAPH, QUEUE, SYNCED, WALL = "graph", "queue", "synced", "wall"
#: Steps of a round that is short, so that a replay's own start is spread over them.
FEWEST = 8
#: Steps of a round at most: past that a figure says that it may come from the cache.
MOST = 512
#: Queued launches of a round: the driver's queue holds about a thousand, and a full one makes the host wait.
QUEUED = 48
_DELAY_CYCLES = 20_000_000  # about 10 ms of a device; doubled until the host is ahead


@dataclass(frozen=True)
class Timed:
    """Median seconds of a step; how: GRAPH, QUEUE, SYNCED or WALL (a CPU's clock); of how many rounds; how far the
    middle half of them spreads over the median; and bytes that a round is known to touch, against the cache's."""

    seconds: float
    how: str
    rounds: int
    spread: float
    touched: int = 0
    cache: int = 0

    @property
    def past_cache(self) -> bool:
        """Whether a round is proven to read from memory and not from the L2."""
        return self.touched > 2 * self.cache


def cache_size(device: str) -> int:
    """Bytes of the device's L2; 0 on a CPU, whose figures are not meant to be compared with memory."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.startswith("cuda") else 0


def sets_for(size: int, cache: int) -> int:
    """How many sets of `size` bytes pass the cache twice over; at least two, and MOST at most."""
    return max(2, min(MOST, 1 + 2 * cache // max(size, 1)))


def device_seconds(make: Callable[[], Step], size: int, device: str, repeats: int) -> Timed:
    """Time a step of `size` bytes, made as often as it takes to pass the L2 twice; `repeats` rounds are measured."""
    cache = cache_size(device)
    sets = sets_for(size, cache)
    if not device.startswith("cuda"):
        return _wall([make() for _ in range(sets)], repeats, size)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    # Made on the stream that captures: autograd runs a backward pass on the stream of its forward.
    with torch.cuda.stream(stream):
        steps = [make() for _ in range(sets)]
        for step in steps:  # compiles, tunes and allocates
            step()
    stream.synchronize()
    times, how = _on_device(steps, stream, repeats)
    torch.cuda.current_stream(device).wait_stream(stream)
    return _summary(times, how, size * (sets if how == GRAPH else min(sets, QUEUED)), cache)


def _on_device(steps: Sequence[Step], stream: Any, repeats: int) -> tuple[list[float], str]:
    """Seconds of a step in each round, and how they were measured."""
    steps = list(steps) * -(-FEWEST // len(steps))
    try:
        return _replayed(steps, stream, repeats), GRAPH
    except Exception:  # whatever a library raises for what cannot be captured: a host's wait, an allocation
        torch.cuda.synchronize()
    steps = steps[:QUEUED]
    times = _queued(steps, stream, repeats)
    return (times, QUEUE) if times else (_synced(steps, stream, repeats), SYNCED)


def _replayed(steps: Sequence[Step], stream: Any, repeats: int) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [step() for step in steps]  # kept, so that each has memory of its own
    with torch.cuda.stream(stream):
        for _ in range(3):
            graph.replay()
        pairs = []
        for _ in range(repeats):
            start, stop = _event(), _event()
            start.record()
            graph.replay()
            stop.record()
            pairs.append((start, stop))
    stream.synchronize()
    del results
    return [start.elapsed_time(stop) * 1e-3 / len(steps) for start, stop in pairs]


def _queued(steps: Sequence[Step], stream: Any, repeats: int) -> list[float]:
    """Nothing when the host cannot get ahead: the step waits for the device."""
    cycles = _DELAY_CYCLES
    times: list[float] = []
    with torch.cuda.stream(stream):
        for step in steps:
            step()
        while len(times) < repeats:
            start, stop = _event(), _event()
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            start.record()
            results = [step() for step in steps]
            stop.record()
            ahead = not start.query()
            stop.synchronize()
            del results
            if ahead:
                times.append(start.elapsed_time(stop) * 1e-3 / len(steps))
            elif cycles < 16 * _DELAY_CYCLES:
                cycles *= 2
            else:
                return []
    return times


def _synced(steps: Sequence[Step], stream: Any, repeats: int) -> list[float]:
    """The host's waits are in it, a round's start is not."""
    times: list[float] = []
    with torch.cuda.stream(stream):
        for _ in range(repeats):
            start, stop = _event(), _event()
            start.record()
            results = [step() for step in steps]
            stop.record()
            stop.synchronize()
            del results
            times.append(start.elapsed_time(stop) * 1e-3 / len(steps))
    return times


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall(steps: Sequence[Step], repeats: int, size: int) -> Timed:
    for step in steps:
        step()
    times = []
    for number in range(repeats):
        start = time.perf_counter()
        steps[number % len(steps)]()
        times.append(time.perf_counter() - start)
    return _summary(times, WALL, len(steps) * size, 0)


def _summary(times: list[float], how: str, touched: int, cache: int) -> Timed:
    median = statistics.median(times)
    quarters = statistics.quantiles(times, n=4) if len(times) > 3 else (median, median, median)
    return Timed(median, how, len(times), (quarters[2] - quarters[0]) / median if median else 0.0, touched, cache)


def copy_time(size: int, device: str, repeats: int) -> Timed:
    """Copying `size` bytes in all (half read, half written), timed as everything else is."""

    def make() -> Step:
        source = torch.empty(max(size // 2, 1), dtype=torch.uint8, device=device)
        return functools.partial(torch.empty_like(source).copy_, source)

    return device_seconds(make, size, device, repeats)


def milliseconds_of_launch(run: Step, repeats: int = 20) -> float:
    """Median device milliseconds of one launch on its own arguments, for comparing tiles: replayed, so that launch cost
    is out of it. What the arguments leave in the L2 is the same for every tile."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    times, _ = _on_device([run], stream, repeats)
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times) * 1e3
