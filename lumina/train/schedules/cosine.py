"""Warm-up, then half a cosine period down to `min_lr` at the last step (arXiv:1608.03983)."""

from __future__ import annotations

import math
from collections.abc import Callable

from lumina.config import OptimConfig
from lumina.train.schedules._warmup import with_warmup


def cosine(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    peak, floor = config.learning_rate, config.min_lr
    return with_warmup(
        config, total_steps, lambda progress: floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    )


SCHEDULE = cosine
