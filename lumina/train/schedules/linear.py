"""Warm-up, then a straight line down to `min_lr` at the last step."""

from __future__ import annotations

from collections.abc import Callable

from lumina.config import OptimConfig
from lumina.train.schedules._warmup import with_warmup


def linear(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    peak, floor = config.learning_rate, config.min_lr
    return with_warmup(config, total_steps, lambda progress: peak + (floor - peak) * progress)


SCHEDULE = linear
