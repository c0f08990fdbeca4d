"""The step timer, by a clock that the test turns: time goes to the innermost phase and adds up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from lumina.train.deepspeed import StepTimer, surface


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def positive(split: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in split.items() if value}


def test_the_innermost_phase_has_the_time(clock: Clock) -> None:
    timer = StepTimer(torch.device("cpu"), now=clock.read)
    clock.now = 1
    with timer.phase("backward"):
        clock.now = 3
        with timer.phase("communication"):
            clock.now = 7
        clock.now = 8
    clock.now = 10
    assert positive(timer.lap().read()) == {"other": 3, "backward": 3, "communication": 4}
    clock.now = 11
    assert positive(timer.lap().read()) == {"other": 1}


def test_exchanges_are_a_phase_of_their_own_with_their_bytes(clock: Clock) -> None:
    timer = StepTimer(torch.device("cpu"), now=clock.read)
    for sent in (300, 40):
        with timer.phase("forward"):
            clock.now += 2
            with timer.exchanging(sent):
                clock.now += 5
    with timer.phase("backward"), timer.communicating():
        clock.now += 1
    times = timer.lap()
    assert times.exchanged == 340
    assert positive(times.read()) == {"forward": 4, "exchange": 10, "communication": 1}
    assert timer.lap().exchanged == 0


def test_what_an_evaluation_exchanges_and_communicates_is_no_steps(clock: Clock) -> None:
    """A step's speed, and its computing, count what the step itself did."""
    timer = StepTimer(torch.device("cpu"), now=clock.read)
    for name in ("evaluation", "saving"):
        with timer.phase(name):
            with timer.communicating():
                clock.now += 3
            with timer.exchanging(100), timer.phase("forward"):
                clock.now += 4
            clock.now += 1
        with timer.phase("forward"):
            clock.now += 1
        times = timer.lap()
        assert times.exchanged == 0
        assert positive(times.read()) == {name: 8, "forward": 1}


def test_an_exception_ends_its_phase(clock: Clock) -> None:
    timer = StepTimer(torch.device("cpu"), now=clock.read)

    def failing() -> None:
        with timer.phase("forward"):
            clock.now = 2
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    clock.now = 3
    assert positive(timer.lap().read()) == {"forward": 2, "other": 1}


def test_waiting_for_data(clock: Clock) -> None:
    closed = []

    def batches() -> Iterator[int]:
        try:
            for number in range(3):
                clock.now += 5
                yield number
        finally:
            closed.append(True)

    timer = StepTimer(torch.device("cpu"), now=clock.read)
    for number in timer.waits(batches()):
        clock.now += 1
        if number == 1:
            break
    assert positive(timer.lap().read()) == {"data": 10, "other": 2}
    del number
    assert [*timer.waits(batches())] == [0, 1, 2]
    assert len(closed) == 2


@pytest.fixture
def backend() -> Iterator[object]:
    import deepspeed
    from deepspeed.comm import comm

    from lumina.train.deepspeed import startup

    startup.init_process_group()
    yield comm.cdb  # the group stays: DeepSpeed keeps hold of it, and other test files in this process use it
    del deepspeed


def test_deepspeeds_collectives_are_communication(backend: object, clock: Clock) -> None:
    from deepspeed.comm import comm

    earlier = StepTimer(torch.device("cpu"), now=clock.read)  # another engine's, in the same process
    earlier.watch_collectives()
    timer = StepTimer(torch.device("cpu"), now=clock.read)
    timer.watch_collectives()
    earlier.close()
    seen = []
    inner = timer.phase

    def watched(name: str):  # type: ignore[no-untyped-def]
        seen.append(name)
        clock.now += 1
        return inner(name)

    timer.phase = watched  # type: ignore[method-assign]
    value = torch.tensor([3.0])
    comm.all_reduce(value)
    handle = comm.all_reduce(value, async_op=True)
    assert seen == ["communication"] * 2
    handle.wait()
    assert seen == ["communication"] * 3
    assert value.item() == 3.0 * dist.get_world_size()
    # A thread that saves beside the step does not change the step's phase.
    thread = threading.Thread(target=lambda: comm.all_reduce(value))
    thread.start()
    thread.join()
    assert seen == ["communication"] * 3
    timer.close()
    assert vars(backend).keys().isdisjoint(surface.COLLECTIVES)


class Moment:
    """Stands for a CUDA event: the arithmetic over events is the same without a GPU."""

    def __init__(self, at: float) -> None:
        self.at = at

    def elapsed_time(self, later: Moment) -> float:
        return 1000 * (later.at - self.at)  # milliseconds, as CUDA has it

    def query(self) -> bool:
        return True


def test_a_collective_beside_an_evaluation_is_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "one of its own")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "the default one")
    now = [0.0]
    timer = StepTimer(torch.device("cuda"), now=lambda: Moment(now[0]))

    def gather() -> None:
        with timer.communicating():
            now[0] += 2

    with timer.phase("evaluation"):
        gather()
    assert "communication_overlapped" not in timer.lap().read()
    with timer.phase("backward"):
        gather()
    assert timer.lap().read()["communication_overlapped"] == 2.0


def test_times_from_events() -> None:
    now = [0.0]
    timer = StepTimer(torch.device("cuda"), now=lambda: Moment(now[0]))
    for _ in range(2):
        began = now[0]
        with timer.phase("backward"):
            now[0] += 3
            with timer.phase("communication"):
                now[0] += 2
        now[0] += 1
        timer._beside.append((Moment(began), Moment(began + 1.5)))
        assert timer.lap().read() == {
            "data": 0.0,
            "forward": 0.0,
            "backward": 3.0,
            "communication": 2.0,
            "optimizer": 0.0,
            "other": 1.0,
            "communication_overlapped": 1.5,
        }
