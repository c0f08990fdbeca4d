"""Stopping on a signal: noted when it comes, acted upon by all ranks together at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

# sysexits.h EX_TEMPFAIL: the run was asked to stop, saved, and can be resumed. Not a failure of the run.
EXIT_STOPPED = 75


class StopRequest:
    """Set by SIGTERM or SIGINT. A second SIGINT interrupts at once, for a user who will not wait."""

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
