"""Snapshots' memory is not rounded up, and copies beside the training are of one step, in whatever order the device
works through its streams. There is no GPU here: the streams are played by queues."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lumina.checkpoint import (
    SLAB,
    CheckpointReader,
    Retention,
    SaveJob,
    Saver,
    SaveTarget,
    Slabs,
    Snapshot,
    StagingBuffer,
    TrainerState,
    slab_sizes,
    staging,
)
from lumina.config import load
from lumina.plan.costs.memory import parameter_groups
from lumina.train import step as step_module
from lumina.train.saving.snapshot import take_snapshot
from tests.train.tiny_engines import make_engine, state_of, train_step

# --- Memory ---


def power_of_two(size: int) -> int:
    """What torch's pinned-memory allocator gives for `size` bytes."""
    return 1 << (size - 1).bit_length()


def test_slabs_are_powers_of_two_and_little_larger_than_asked_for() -> None:
    draw = random.Random(0)
    totals = [0, 1, 64, 65, SLAB - 1, SLAB, SLAB + 1, *(int(2 ** draw.uniform(6, 38)) for _ in range(2000))]
    for total in totals:
        sizes = slab_sizes(total)
        assert all(size == power_of_two(size) <= SLAB for size in sizes)
        assert total <= sum(sizes) <= max(total * 33 / 32, total + 63)
        assert len(sizes) <= total // SLAB + 7


@pytest.mark.parametrize("world", [1, 8])
def test_large_is_held_with_less_than_a_twentieth_wasted(world: int) -> None:
    """Master weights and two moments of `large`, each group of parameters shared between ranks as stages 1 and 2 do it.
    A pinned buffer for each tensor, as it was, is shown beside it."""
    for rank in range(world):
        sizes: list[int] = []
        for group in parameter_groups(load("large", {})):
            share, begin = -(-sum(group) // world), 0
            for count in group:
                low, high = max(begin, rank * share), min(begin + count, (rank + 1) * share)
                sizes += [4 * (high - low)] * (3 if high > low else 0)
                begin += count
        wanted = sum(sizes)
        held = sum(slab_sizes(sum(-(-size // 64) * 64 for size in sizes)))
        before = sum(map(power_of_two, sizes))
        print(f"rank {rank} of {world}: {wanted / 1e9:.3f} GB in {held / 1e9:.3f}, one buffer each {before / 1e9:.3f}")
        assert wanted <= held < 1.05 * wanted
        assert before > 1.15 * wanted


@pytest.mark.parametrize("largest", [256, 1024, 2**20])
def test_every_value_has_its_own_place(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of odd sizes and several types, over the ends of slabs; growing keeps what there is."""
    monkeypatch.setattr(staging, "SLAB", largest)
    room, draw = Slabs(pinned=False), random.Random(largest)
    held = 0
    for count in (5, 3, 40, 40):
        kinds = [torch.float32, torch.bfloat16, torch.uint8]
        values = {str(n): torch.randn(draw.randint(1, 700)).to(draw.choice(kinds)) for n in range(count)}
        copies = room.lay_out(values)
        staging._fill(copies, values)
        for name, value in values.items():
            assert torch.equal(torch.cat(copies[name]), value)
            assert all(part.data_ptr() % 64 == 0 or part.dtype is torch.uint8 for part in copies[name])
        assert room.bytes >= held
        held = room.bytes
    again = room.lay_out(values)
    assert room.bytes == held
    assert [p.data_ptr() for parts in again.values() for p in parts] == [
        p.data_ptr() for parts in copies.values() for p in parts
    ]


# --- A device whose streams take turns at random ---


class Device:
    """Streams are queues of work; `run` does the first of any queue that waits for nothing, chosen at random."""

    def __init__(self, seed: int) -> None:
        self.draw, self.streams = random.Random(seed), list[FakeStream]()
        self.current = FakeStream(self)
        self.main = self.current
        self.waited_by: list[str] = []  # threads of the host that waited for the device
        self.lock = threading.Lock()

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        with self.lock:
            while not until():
                ready = [s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].done)]
                if not ready:
                    assert not any(s.queue for s in self.streams), "streams wait for each other"
                    return
                _, work = self.draw.choice(ready).queue.popleft()
                work()


class FakeEvent:
    def __init__(self, device: Device, **_: Any) -> None:
        self.device, self.done = device, False

    def record(self, stream: FakeStream) -> None:
        stream.queue.append((None, lambda: setattr(self, "done", True)))

    def synchronize(self) -> None:
        self.device.waited_by.append(threading.current_thread().name)
        self.device.run(lambda: self.done)
        assert self.done


class FakeStream:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.queue: deque[tuple[FakeEvent | None, Callable[[], None]]] = deque()
        device.streams.append(self)

    def wait_event(self, event: FakeEvent) -> None:
        self.queue.append((event, lambda: None))

    def wait_stream(self, other: FakeStream) -> None:
        event = FakeEvent(self.device)
        event.record(other)
        self.wait_event(event)


def play(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch.cuda played by `device`. Returns the sizes of pinned buffers, as they are made."""

    @contextmanager
    def within(stream: FakeStream) -> Iterator[None]:
        before, device.current = device.current, stream
        yield
        device.current = before

    pinned: list[int] = []
    fill, empty = staging._fill, torch.empty

    def allocate(*shape: Any, pin_memory: bool = False, **kinds: Any) -> torch.Tensor:
        if pin_memory:
            pinned.append(*shape)
        return empty(*shape, **kinds)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream(device))
    monkeypatch.setattr(torch.cuda, "Event", lambda **given: FakeEvent(device, **given))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.current)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(staging, "_fill", lambda *given: device.current.queue.append((None, lambda: fill(*given))))
    return pinned


def snapshots(device: Device, fenced: bool) -> list[tuple[int, float]]:
    """(step, value found) of snapshots after steps 1 to 4, an update a step; `fenced`: whether updates wait."""
    weights, found = torch.zeros(1000), list[tuple[int, float]]()
    copies = StagingBuffer(torch.device("cuda"))
    writer: Callable[[], None] = lambda: None
    for step in range(1, 5):
        if fenced:
            copies.before_update()
        device.main.queue.append((None, lambda: weights.add_(1.0)))
        writer()  # of the snapshot before: it may read only now
        tensors, event = copies.copy({"weights": weights})

        def writer(step: int = step, event: Any = event, part: torch.Tensor = tensors["weights"][0]) -> None:
            event.synchronize()
            found.append((step, float(part.mean())))

    writer()
    return found


def test_a_snapshot_is_of_its_step_in_whatever_order_streams_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the updates' waiting is what makes it so: without it some order shows another step."""
    wrong = 0
    for seed in range(200):
        for fenced in (True, False):
            with monkeypatch.context() as patch:
                play(device := Device(seed), patch)
                right = all(step == value for step, value in snapshots(device, fenced))
            assert right or not fenced, f"order {seed}"
            wrong += not right
    assert wrong > 20


def test_the_loop_does_not_wait_and_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save through the copy stream: only the writer's thread waits for the device, the memory is pinned in few
    slabs, and what is written is what was there, optimizer's step count included."""
    made = make_engine(2)
    train_step(made, 0)
    plain = take_snapshot(made, TrainerState(step=1))
    plain.wait()
    saver = Saver(0, 1, "test", timeout=60)
    with monkeypatch.context() as patch:
        pinned = play(device := Device(1), patch)
        copies = StagingBuffer(torch.device("cuda"))
        snapshot = take_snapshot(made, TrainerState(step=1), copies)
        copies.before_update()
        assert "optimizer_step" not in snapshot.trainer
        assert device.waited_by == []
        saver.begin(SaveJob(snapshot, [SaveTarget("checkpoint", tmp_path, Retention(1))]))
        assert saver.wait()
    (outcome,) = saver.outcomes()
    assert outcome.path is not None, outcome.error
    assert device.waited_by == ["lumina-saver"]
    assert 0 < len(pinned) <= 7
    assert snapshot.trainer == plain.trainer
    assert snapshot.trainer["optimizer_step"] == 1
    reader = CheckpointReader(outcome.path)
    for key, value in state_of(made).items():
        kind, name = key.split("/")
        found = torch.empty(value.numel())
        reader.read(kind, name, 0, found)
        assert torch.equal(found, value)


def test_the_update_comes_after_the_copies() -> None:
    order: list[str] = []
    engine = SimpleNamespace(step=lambda limit: (order.append("update"), (1.0, True))[1])
    run = SimpleNamespace(
        config=SimpleNamespace(layer_stats_every=0),
        saves=SimpleNamespace(before_update=lambda: order.append("wait")),
        state=SimpleNamespace(engine=engine, consistent=True),
    )
    step_module.update(run, SimpleNamespace(step=0), torch.tensor(2.0))  # type: ignore[arg-type]
    assert order == ["wait", "update"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_snapshot_that_is_not_finite(value: float) -> None:
    parts = [torch.ones(3), torch.tensor([1.0, value])]
    assert not Snapshot(1, {"master/a": parts}, {}).finite()
    assert Snapshot(1, {"master/a": parts[:1], "rng/cpu": [torch.zeros(2, dtype=torch.uint8)]}, {}).finite()
