"""torch's OneCycleLR with pct_start = `warmup_ratio` (arXiv:1708.07120); `min_lr` does not enter.

Both ends come from the peak, with OneCycleLR's defaults: it starts at peak / 25 and ends at that start / 10,000.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lumina.config import OptimConfig

_DIV_FACTOR, _FINAL_DIV_FACTOR = 25.0, 1e4


def onecycle(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    return lambda step: _rate(step, total_steps, config.learning_rate, config.warmup_ratio)


def _rate(step: int, total_steps: int, peak: float, rise: float) -> float:
    start = peak / _DIV_FACTOR
    end = start / _FINAL_DIV_FACTOR
    top, last = rise * total_steps - 1, total_steps - 1  # the peak's step, before the first one in a short rise
    if step <= top and top > 0:
        low, high, progress = start, peak, step / top
    else:
        low, high, progress = peak, end, (step - top) / (last - top) if last > top else 1.0
    return high + (low - high) / 2 * (1 + math.cos(math.pi * min(1.0, progress)))


SCHEDULE = onecycle
