"""The health of a run, in one word for the console line."""

from __future__ import annotations

import math


class Health:
    """OK; WARN(reason) for `window` steps after an update was skipped; CRIT(reason) while the loss is not finite or
    several updates in a row were skipped."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._skipped_at: int | None = None
        self._in_a_row = 0

    def check(self, step: int, loss: float, applied: bool) -> str:
        self._in_a_row = 0 if applied else self._in_a_row + 1
        if not applied:
            self._skipped_at = step
        if not math.isfinite(loss):
            return "CRIT(loss is not finite)"
        if self._in_a_row >= 3:
            return f"CRIT({self._in_a_row} updates skipped in a row)"
        if self._skipped_at is not None and step - self._skipped_at < self._window:
            return f"WARN(update of step {self._skipped_at} skipped: gradient not finite)"
        return "OK"
