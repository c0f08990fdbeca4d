"""The watchdog's second clock: a small process that ends a rank in which no Python code runs any more.

A program of its own, started with its rank's process ID and number and a pipe from it; imports nothing but the standard
library. The rank's watchdog thread writes a line twice a second: how many seconds may pass until the next one. Counted
are only seconds in which both processes could run: not those in which the rank is stopped (Ctrl-Z, `scontrol suspend`,
a debugger), nor those in which this process did not run itself. A clock in the rank, faulthandler's too, goes on while
the rank is stopped, and would end it when it wakes.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

_TICK = 0.5  # seconds
_LAST = 10.0  # seconds from the signal that has the stacks written to the one that nothing survives


def stopped(process: int) -> bool:
    """Whether a process is stopped, by a signal or a tracer (Linux, proc_pid_stat(5))."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def main() -> None:
    """Watch until the pipe is closed, or the rank is gone."""
    rank, number = int(sys.argv[1]), sys.argv[2]
    limit, silent = 0.0, 0.0
    while os.getppid() == rank:
        began = time.monotonic()
        if select.select([0], [], [], _TICK)[0]:
            lines = os.read(0, 1 << 16).split()
            if not lines:
                return
            limit, silent = float(lines[-1]), 0.0
            continue
        if stopped(rank):
            continue
        silent += min(time.monotonic() - began, 2 * _TICK)
        if limit and silent > limit:
            text = f"WATCHDOG rank {number}: no Python code has run for {silent:.0f} s: something holds its lock"
            print(text, file=sys.stderr, flush=True)
            os.kill(rank, signal.SIGABRT)  # faulthandler writes the stacks, without needing the lock
            time.sleep(_LAST)
            if os.getppid() == rank:
                os.kill(rank, signal.SIGKILL)
            return


if __name__ == "__main__":
    main()
