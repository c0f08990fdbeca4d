"""The linear warm-up that several schedules begin with, and the progress of the decay after it."""

from __future__ import annotations

from collections.abc import Callable

from lumina.config import OptimConfig


def with_warmup(config: OptimConfig, total_steps: int, decay: Callable[[float], float]) -> Callable[[int], float]:
    """`warmup_ratio` of the steps rise linearly to `learning_rate`; after them `decay` gives the rate by the progress
    of the rest, 0 at the end of the warm-up and 1 at the last step (and beyond)."""
    peak = config.learning_rate
    warmup = round(config.warmup_ratio * total_steps)

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        return decay(min(1.0, max(0, step - warmup) / max(1, total_steps - 1 - warmup)))

    return rate
