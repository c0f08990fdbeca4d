"""Progress of preparing in the log, for callers that draw no bar."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("lumina.data")

FIRST, EVERY = 2.0, 10.0  # seconds: to the first line, and between lines


class LoggedProgress:
    """An OnProgress that logs `preparing: 12.0 of 340.1 MB`, from two seconds on, every ten seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + FIRST

    def __call__(self, done: int, total: int) -> None:
        """Bytes of input."""
        now = time.monotonic()
        if now >= self._next and done < total:
            self._next = now + EVERY
            log.info("preparing: %.1f of %.1f MB", done / 1e6, total / 1e6)
