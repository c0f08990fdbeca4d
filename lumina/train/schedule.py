"""Learning rates as pure functions of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

from lumina.config import OptimConfig

Schedule = Callable[[int], float]

# torch.optim.lr_scheduler.OneCycleLR's defaults: start at peak/25, end at that start/1e4.
_ONECYCLE_DIV, _ONECYCLE_FINAL_DIV = 25.0, 1e4


def schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Learning rate of optimizer step k, for k in [0, total_steps).

    `warmup_ratio` of the steps rise linearly to `learning_rate`; then cosine (arXiv:1608.03983, one half period) or
    linear decay to `min_lr` at the last step, or constant. "onecycle" is torch's OneCycleLR with pct_start =
    warmup_ratio (arXiv:1708.07120); its ends come from the peak, so min_lr does not enter.
    """
    peak, floor = config.learning_rate, config.min_lr
    warmup = round(config.warmup_ratio * total_steps)

    def progress(step: int) -> float:
        """0 at the end of the warm-up, 1 at the last step."""
        return min(1.0, max(0, step - warmup) / max(1, total_steps - 1 - warmup))

    decay: dict[str, Schedule] = {
        "cosine": lambda step: floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress(step))),
        "linear": lambda step: peak + (floor - peak) * progress(step),
        "constant": lambda step: peak,
    }
    if config.lr_scheduler == "onecycle":
        return lambda step: _onecycle(step, total_steps, peak, config.warmup_ratio)
    after = decay[config.lr_scheduler]
    return lambda step: peak * (step + 1) / warmup if step < warmup else after(step)


def _onecycle(step: int, total_steps: int, peak: float, rise: float) -> float:
    start = peak / _ONECYCLE_DIV
    end = start / _ONECYCLE_FINAL_DIV
    top, last = rise * total_steps - 1, total_steps - 1  # the peak's place, before the first step in a short rise
    if step <= top and top > 0:
        low, high, part = start, peak, step / top
    else:
        low, high, part = peak, end, (step - top) / (last - top) if last > top else 1.0
    return high + (low - high) / 2 * (1 + math.cos(math.pi * min(1.0, part)))
