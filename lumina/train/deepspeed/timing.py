"""Step timing by phase: waiting for data, forward, backward, communication, optimizer, exchange, saving, evaluation.

Phases nest, and time counts for the innermost only: the collectives that DeepSpeed starts within a backward pass count
as communication, those between ranks that share rows as exchange, not as backward. What is done within an evaluation or
a save is that, whatever it does. On a GPU the times are those of CUDA events, read one step late (`PhaseTimes`): by
then the device has passed them, and nobody waits. Collectives on a stream of their own run beside the computation: they
are `communication_overlapped`, which is not part of the sum.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from lumina.train.deepspeed.surface import COLLECTIVES

PHASES = ("data", "forward", "backward", "communication", "optimizer", "exchange", "saving", "evaluation", "other")
APART = ("saving", "evaluation")  # no part of a step
T = TypeVar("T")


class PhaseTimes:
    """What a timer measured between two calls of `lap`. exchanged: bytes that left this rank for those that it shares
    rows with."""

    def __init__(
        self,
        seconds: dict[str, float],
        since: Any,
        marks: list[tuple[Any, str]],
        beside: list[tuple[Any, Any]],
        exchanged: int,
    ) -> None:
        self._seconds, self._since, self._marks, self._beside = seconds, since, marks, beside
        self.exchanged = exchanged

    def read(self) -> dict[str, float]:
        """Seconds by phase; they add up to the time between the two calls. On a GPU to be read once, when the device
        has come past the second call, as after waiting for anything that was queued later."""
        for event, phase in self._marks:
            self._seconds[phase] += self._since.elapsed_time(event) / 1000
            self._since = event
        done = [(began, ended) for began, ended in self._beside if ended.query()]
        if done:
            self._seconds["communication_overlapped"] = sum(a.elapsed_time(b) for a, b in done) / 1000
        return {name: value for name, value in self._seconds.items() if value or name in PHASES[:5]}


class StepTimer:
    """One rank's clock. A change of phase costs about a microsecond on a CPU and one recorded event on a GPU.

    now: reads the time, in seconds on a CPU and as a recorded event on a GPU; None is the device's own clock.
    """

    def __init__(self, device: torch.device, now: Callable[[], Any] | None = None) -> None:
        self._gpu = device.type == "cuda"
        self._now = now or (_event if self._gpu else time.perf_counter)
        self._phases = ["other"]
        self._marks: list[tuple[Any, str]] = []  # GPU: an event, and the phase that it ends
        self._beside: list[tuple[Any, Any]] = []  # GPU: events around a collective on another stream
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since: Any = self._now()
        self._undo: list[Callable[[], None]] = []
        self._exchanged = 0
        self.collectives = 0  # started by DeepSpeed so far: where this rank stands among the others

    def _mark(self) -> None:
        now = self._now()
        if self._gpu:
            self._marks.append((now, self._phases[-1]))
        else:
            self._seconds[self._phases[-1]] += now - self._since
            self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._mark()
        self._phases.append(self._phases[-1] if self._apart else name)
        try:
            yield
        finally:
            self._mark()
            self._phases.pop()

    @property
    def _apart(self) -> bool:
        return self._phases[-1] in APART

    def waits(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, with the wait for each counted as data."""
        iterator = iter(items)
        try:
            while True:
                try:
                    with self.phase("data"):
                        item = next(iterator)
                except StopIteration:
                    return
                yield item
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def lap(self) -> PhaseTimes:
        """The time since the last call, to be read later."""
        self._mark()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        exchanged, self._exchanged = self._exchanged, 0
        if not self._gpu:
            return PhaseTimes(seconds, None, [], [], exchanged)
        marks, self._marks, beside, self._beside = self._marks, [], self._beside, []
        since, self._since = self._since, marks[-1][0]
        return PhaseTimes(seconds, since, marks, beside, exchanged)

    # --- Communication ---

    def watch_collectives(self) -> None:
        """Time the collectives that DeepSpeed starts, until `close` or until another timer watches them: the backend is
        one for all engines of a process."""
        from deepspeed.comm import comm

        backend = comm.cdb
        for name in COLLECTIVES:
            timed = self._timed(partial(getattr(type(backend), name), backend))
            setattr(backend, name, timed)
            self._undo.append(partial(_unset, backend, name, timed))

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.collectives += 1
            with self.communicating():
                handle = call(*args, **kwargs)
            return _Handle(handle, self) if hasattr(handle, "wait") else handle

        return timed

    def exchanging(self, sent: int) -> AbstractContextManager[None]:
        """What is done in the `with` block is a collective of ranks that share rows, by which `sent` bytes leave this
        one."""
        self._exchanged += 0 if self._apart else sent
        return self.communicating("exchange")

    @contextmanager
    def communicating(self, phase: str = "communication") -> Iterator[None]:
        """What is done in the `with` block is a collective."""
        if self._gpu and torch.cuda.current_stream() != torch.cuda.default_stream():
            began = self._now()
            yield
            if not self._apart:  # that of an evaluation or a save is no part of a step
                self._beside.append((began, self._now()))
        elif threading.current_thread() is threading.main_thread() or self._gpu:
            with self.phase(phase):
                yield
        else:  # a thread that works beside the step, such as one that saves
            yield


def _event() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _unset(owner: object, name: str, value: object) -> None:
    if vars(owner).get(name) is value:
        delattr(owner, name)


class _Handle:
    """A started collective; waiting for it is communication too."""

    def __init__(self, handle: Any, timer: StepTimer) -> None:
        self._handle, self._timer = handle, timer

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._timer.communicating():
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
