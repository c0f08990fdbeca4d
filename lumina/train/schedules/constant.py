"""Warm-up, then `learning_rate` to the end; `min_lr` does not enter."""

from __future__ import annotations

from collections.abc import Callable

from lumina.config import OptimConfig
from lumina.train.schedules._warmup import with_warmup


def constant(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    return with_warmup(config, total_steps, lambda progress: config.learning_rate)


SCHEDULE = constant
