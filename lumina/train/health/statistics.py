"""Robust statistics over a sliding window: the median and the median absolute deviation, which stay where they are as
long as under half of the values are outliers (Hampel, 1974)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

_TO_SIGMA = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


def median(values: Iterable[float]) -> float:
    """The median; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


class RollingWindow:
    """A sliding window of the last `size` finite values. A new value is compared with it first, and added after."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._values: deque[float] = deque(values, maxlen=size)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Take a value in; one that is not finite is left out."""
        if math.isfinite(value):
            self._values.append(value)

    def values(self) -> list[float]:
        return list(self._values)

    def median(self) -> float:
        return median(self._values)

    def largest(self) -> float:
        """The largest value; -infinity of nothing."""
        return max(self._values, default=-math.inf)

    def spread(self) -> tuple[float, float]:
        """(median, robust standard deviation)."""
        middle = self.median()
        return middle, _TO_SIGMA * median(abs(value - middle) for value in self._values)

    def clear(self) -> None:
        self._values.clear()
