"""Watchdog: ends a process that makes no progress and says where it stood, rather than wait for a collective's timeout.

Progress is a call of `heartbeat`, at every micro-batch, step, evaluation batch and save, and within a step each layer
that the device comes past, forward and backward (lumina.train.liveness.progress). Two clocks watch it. One is a
Python thread that finds the usual hang, a collective whose other side is gone (those wait without the interpreter's
lock): it writes every thread's stack to stderr, says which collective the main thread sits in, and ends the process.
Where the lock itself is held, by a kernel that never returns, that thread cannot run: a process of its own
(lumina.train.liveness.lock_watch) then has faulthandler write the stacks, which needs no lock, and ends it.

Time in which the process is suspended (Ctrl-Z, `scontrol suspend`) is no hang: neither clock counts it.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from lumina.cluster import EXIT_HUNG, StopRequest
from lumina.files import write_json
from lumina.terminal import say
from lumina.train.liveness import lock_watch
from lumina.train.liveness.progress import Progress

_COLLECTIVES = "torch.distributed.distributed_c10d"
_TICK = 0.5  # seconds
_GRACE = 5.0  # seconds that the second clock leaves to the first
_SUSPENDED = 2.0  # seconds by which a tick is late when the process was suspended
_IDLE = 0.1  # of that time, at most, the process computed: more, and it only held the interpreter's lock


class Watchdog:
    """Ends the process when `timeout` seconds pass without progress, or `stop_timeout` once a signal asked it to stop.
    progress: what there is within a step.

    `rank` is for the message. 0 turns a limit off. The first heartbeat of each `with` block may take `start_timeout`:
    data is prepared, kernels are compiled and workers imported before it.
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
        self._after = ""  # the last mark within it
        self.progress = Progress()
        self._closed = threading.Event()
        self._main = threading.main_thread().ident
        self.end: Callable[[int], None] = os._exit  # tests look instead of ending
        self._suspended = 0.0  # seconds since the stop was asked for
        self._thread: threading.Thread | None = None
        self._lock_watch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        self._closed.clear()
        self._heartbeats, self._what, self._last = 0, "starting", time.monotonic()
        if self._timeout:
            faulthandler.enable(2)  # writes the stacks at SIGABRT
            command = [sys.executable, "-I", "-S", lock_watch.__file__, str(os.getpid()), str(self._rank)]
            # In a session of its own: Ctrl-C and Ctrl-Z are for the rank.
            self._lock_watch = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, start_new_session=True
            )
        if self.watching:
            self._thread = threading.Thread(target=self._watch, name="lumina-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._lock_watch is not None and self._lock_watch.stdin is not None:
            with suppress(OSError):
                self._lock_watch.stdin.close()
            self._lock_watch.kill()  # a forked child may hold the pipe open
            self._lock_watch.wait()
            self._lock_watch = None

    @property
    def watching(self) -> bool:
        """Whether there is any limit."""
        return bool(self._timeout or self._stop_timeout)

    @property
    def ends_hangs(self) -> bool:
        """Whether a hang ends the process."""
        return self._timeout > 0

    def heartbeat(self, what: str) -> None:
        """Progress was made; `what` is being done from here on. Costs a microsecond."""
        self._what, self._after = what, ""
        self._heartbeats += 1
        self._last = time.monotonic()

    def limit(self) -> float:
        """Seconds allowed without a heartbeat now; 0 for no limit."""
        return max(self._timeout, self._start_timeout) if self._timeout and not self._heartbeats else self._timeout

    def _watch(self) -> None:
        before, computed = time.monotonic(), time.process_time()
        while not self._closed.wait(_TICK):
            limit, now, used = self.limit(), time.monotonic(), time.process_time()
            late = now - before - _TICK
            if late > _SUSPENDED and used - computed < _IDLE * late:
                self._last = min(now, self._last + late)
                self._suspended += late
            before, computed = now, used
            passed, what = self.progress.newest()
            if passed > self._last:
                self._last, self._after = passed, f", after {what}"
            self._tell(max(limit, 1.0) + _GRACE if limit else 0.0)
            if limit and now - self._last > limit:
                self._give_up(f"no progress for {now - self._last:.0f} s (hang_timeout {limit:g}) in: {self._where}")
            asked = self._stop.since
            if asked is None:
                self._suspended = 0.0
            elif self._stop_timeout and now - max(asked + self._suspended, self._last) > self._stop_timeout:
                self._give_up(
                    f"no progress within {self._stop_timeout:g} s of {self._stop.signal} (stop_timeout, to be raised "
                    f"where a layer's pass takes longer), in: {self._where}"
                )

    @property
    def _where(self) -> str:
        return self._what + self._after

    def _tell(self, limit: float) -> None:
        """Have the second clock wait `limit` seconds for the next word from here; 0: for ever."""
        if self._lock_watch is not None and self._lock_watch.stdin is not None:
            with suppress(OSError):  # somebody ended it: the first clock goes on
                self._lock_watch.stdin.write(f"{limit}\n".encode())

    def _give_up(self, reason: str) -> None:
        frames = sys._current_frames()
        place = where(frames.get(self._main or 0))
        text = f"rank {self._rank}: {reason}; {place}"
        dump = [f"WATCHDOG {text}\n"]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in frames.items():
            if ident != threading.get_ident():
                dump += [f"  Thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
        say("".join(dump), file=sys.stderr, flush=True)
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
