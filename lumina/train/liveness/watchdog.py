"""Watchdog: ends a process that makes no progress and says where it stood, rather than wait for a collective's timeout.

Progress is a call of `heartbeat`: at every micro-batch, step, evaluation batch and save. Two clocks watch it. One is a
Python thread that finds the usual hang, a collective whose other side is gone (those wait without the interpreter's
lock): it writes every thread's stack to stderr, says which collective the main thread sits in, and ends the process.
Where the lock itself is held, by a kernel that never returns, that thread cannot run: every half second it re-arms
faulthandler's own C thread, which then dumps the stacks and ends the process without needing the lock.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from lumina.cluster import EXIT_HUNG, StopRequest
from lumina.files import write_json

_COLLECTIVES = "torch.distributed.distributed_c10d"
_TICK = 0.5  # seconds
_C_GRACE = 5.0  # seconds that the C clock leaves to the Python one


class Watchdog:
    """Ends the process when `timeout` seconds pass without a heartbeat, or `stop_timeout` once a signal asked it to
    stop.

    `rank` is for the message. 0 turns a limit off. The first heartbeat may take `start_timeout`: data is prepared,
    kernels are compiled and workers imported before it.
    """

    def __init__(
        self, timeout: float, stop_timeout: float, stop: StopRequest, rank: int, start_timeout: float = 1800.0
    ) -> None:
        self._timeout, self._stop_timeout, self._start_timeout = timeout, stop_timeout, start_timeout
        self._stop = stop
        self._rank = rank
        self._heartbeats = 0
        self._last = time.monotonic()
        self._what = "starting"
        self._closed = threading.Event()
        self._main = threading.main_thread().ident
        self.end: Callable[[int], None] = os._exit  # tests look instead of ending
        self._thread = threading.Thread(target=self._watch, name="lumina-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._timeout or self._stop_timeout:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def heartbeat(self, what: str) -> None:
        """Progress was made; `what` is being done from here on. Costs a microsecond."""
        self._what = what
        self._heartbeats += 1
        self._last = time.monotonic()

    def limit(self) -> float:
        """Seconds allowed without a heartbeat now; 0 for no limit."""
        return max(self._timeout, self._start_timeout) if self._timeout and not self._heartbeats else self._timeout

    def _watch(self) -> None:
        while not self._closed.wait(_TICK):
            limit, now = self.limit(), time.monotonic()
            if limit:
                faulthandler.dump_traceback_later(max(limit, 1.0) + _C_GRACE, exit=True, file=2)
            if limit and now - self._last > limit:
                self._give_up(f"no progress for {now - self._last:.0f} s (hang_timeout {limit:g}) in: {self._what}")
            asked = self._stop.since
            if self._stop_timeout and asked is not None and now - max(asked, self._last) > self._stop_timeout:
                self._give_up(f"no progress within {self._stop_timeout:g} s of {self._stop.signal}, in: {self._what}")

    def _give_up(self, reason: str) -> None:
        frames = sys._current_frames()
        place = where(frames.get(self._main or 0))
        text = f"rank {self._rank}: {reason}; {place}"
        dump = [f"WATCHDOG {text}\n"]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in frames.items():
            if ident != threading.get_ident():
                dump += [f"  Thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
        print("".join(dump), file=sys.stderr, flush=True)
        report_failure(f"hung: {text}")
        self.end(EXIT_HUNG)


def where(frame: FrameType | None) -> str:
    """What the main thread is doing, in one line: the collective it sits in and the line of ours that called it, or
    that line alone."""
    collective, innermost = None, None
    while frame is not None:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        if module == _COLLECTIVES and code.co_name != "wrapper" and not code.co_name.startswith("_"):
            collective = code.co_name
        if innermost is None and str(module).startswith("lumina."):
            innermost = f"{module}.{code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    at = f"at {innermost}" if innermost else "outside Lumina's code"
    return f"in the collective {collective}, {at}" if collective else at


def report_failure(message: str, callstack: str = "") -> None:
    """Leave the reason of this process's end where its torch elastic agent looks for it (TORCHELASTIC_ERROR_FILE)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not Path(path).exists():
        extra = {"py_callstack": callstack, "timestamp": str(int(time.time()))}
        try:
            write_json(Path(path), {"message": {"message": message, "extraInfo": extra}})
        except OSError:
            return  # the exit code still tells the agent that it failed
