"""Stopping on a signal: noted when it comes, acted upon by all ranks together at the next step boundary.

SIGTERM, SIGINT, SIGUSR1 (Slurm's warning before its time limit) and SIGHUP (the terminal was closed, the ssh connection
is gone; not under nohup) mean: save and end. SIGUSR2 comes from Lumina's own
agents and means: save and end, you will be started again at another world size.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lumina.cluster.hangup import without_ignored_hangup

# sysexits.h EX_TEMPFAIL: the run was asked to stop, saved, and can be resumed. Not a failure of the run.
EXIT_STOPPED = 75
# The same, asked for by the agent in order to go on at another world size.
EXIT_RESIZE = 76
# A watchdog ended the process: no progress for too long, or no step boundary in time after a signal.
EXIT_HUNG = 77

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Asked to stop before there was anything to save: never 75, which means that a checkpoint of that step exists.
EXITS_UNSAVED = frozenset(128 + number for number in STOP_SIGNALS)


class StoppedEarly(BaseException):  # no error, as KeyboardInterrupt is none
    """A signal asked to stop before there was anything to save. saved: whether the run has a checkpoint to go on from,
    the one that this start resumes."""

    def __init__(self, number: signal.Signals, saved: bool) -> None:
        super().__init__(f"{number.name} before the first step")
        self.number, self.saved = number, saved


class StopRequest:
    """Set by a signal. A second SIGINT interrupts at once, for a user who will not wait; so does the first while
    `interruptible` is true, when there is nothing to save. Python gives signals to the main thread alone: made in
    another one, it is never set.

    announce: called once, in a thread of its own, with the name of the first signal that asks to stop.
    """

    def __init__(self) -> None:
        self.interruptible = False
        self.saved = False  # the run stands at a checkpoint
        self._early = False
        self.announce: Callable[[str], None] | None = None
        self.signal: str | None = None
        self.resize = False
        self.since: float | None = None  # time.monotonic() of the first signal
        if threading.current_thread() is threading.main_thread():
            for number in without_ignored_hangup((*STOP_SIGNALS, signal.SIGUSR2)):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.signal is not None or self.interruptible):
            raise KeyboardInterrupt
        if self._early and number != signal.SIGUSR2:
            raise StoppedEarly(signal.Signals(number), self.saved)
        if self.signal is None and number != signal.SIGUSR2 and self.announce is not None:
            # Not here: the main thread may be in the middle of a print, whose locks are not for two.
            threading.Thread(target=self.announce, args=(signal.Signals(number).name,), daemon=True).start()
        self.resize = number == signal.SIGUSR2 and (self.signal is None or self.resize)
        self.signal = signal.Signals(number).name
        self.since = self.since or time.monotonic()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In the block there is nothing to save, and what it does may take hours: a signal ends it by StoppedEarly."""
        self._early = True
        try:
            yield
        finally:
            self._early = False

    @property
    def flags(self) -> tuple[float, float]:
        """(asked to stop, asked to restart at another size), for the sum over all ranks."""
        return float(self.signal is not None and not self.resize), float(self.signal is not None and self.resize)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Puts this process's handlers back at the end, for a caller that goes on with something else."""
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGUSR2)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # one that C code installed, which Python cannot put back
                    signal.signal(number, handler)


_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process `number` when its launcher dies, so that no rank is orphaned (Linux, prctl(2)).
    Only for processes that a launcher started: a shell that started a single one may well end before it."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), number)
