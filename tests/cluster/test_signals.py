"""A signal is noted, not obeyed at once; a second Ctrl-C is."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator

import pytest

from lumina.cluster.signals import EXIT_STOPPED, StopRequest, handlers_kept


@pytest.fixture
def request_() -> Iterator[StopRequest]:
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopRequest()
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted(request_: StopRequest, number: signal.Signals) -> None:
    assert request_.signal is None
    signal.raise_signal(number)
    assert request_.signal == number.name


def test_a_second_interrupt_does_not_wait(request_: StopRequest) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # a launcher may repeat it: still saving
    assert request_.signal == "SIGTERM"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back_where_python_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that C code installed before Python looked is None to it (an interpreter inside another program)."""
    before = signal.getsignal(signal.SIGUSR1)
    with handlers_kept():
        StopRequest()
    assert signal.getsignal(signal.SIGUSR1) is before
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)
        with handlers_kept():
            pass
    assert {number: signal.getsignal(number) for number in kept} == kept


def test_the_exit_code_is_its_own() -> None:
    """Neither success, nor a failure of Python (1) or of the user (2), nor a death by signal (128 and up)."""
    assert EXIT_STOPPED not in (0, 1, 2)
    assert EXIT_STOPPED < 128


def test_it_is_announced_once_and_at_once(request_: StopRequest) -> None:
    said: queue.Queue[str] = queue.Queue()
    request_.announce = said.put
    signal.raise_signal(signal.SIGINT)
    assert said.get(timeout=30) == "SIGINT"
    signal.raise_signal(signal.SIGTERM)
    assert said.empty()


def test_with_nothing_to_save_the_first_interrupt_is_obeyed(request_: StopRequest) -> None:
    request_.interruptible = True
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert request_.signal == "SIGTERM"
