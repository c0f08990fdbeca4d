"""The rate that moved the weights at each step of a run is the schedule's of that very step.

Checkpoints of every step hold weights and moments: what AdamW's formula (arXiv:1711.05101) makes of the moments after a
step, and how far the weights went, give the rate that was used, whatever the loop says that it was.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lumina import checkpoint
from tests.runs import Runs, arguments, state, steps

STEPS, WARMUP, PEAK, FLOOR = 8, 3, 1e-2, 1e-4
BETA1, BETA2, EPS, DECAY = 0.9, 0.95, 1e-8, 0.01


def scheduled(step: int) -> float:
    """Of step `step` (from 1): a linear rise over the first three, then half a cosine down to the last."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * (step - 1 - WARMUP) / (STEPS - 1 - WARMUP))) / 2


def test_each_step_is_taken_at_its_own_rate(runs: Runs, conversations: Path, place: Path) -> None:
    run = place / "run"
    settings = {"precision": "fp32", "batch_size": 2, "global_batch_size": 4, "max_steps": STEPS, "keep_last": 99}
    settings |= {"save_every_n_batches": 1, "save_async": False, "lr_scheduler": "cosine", "warmup_ratio": 3 / 8}
    settings |= {"learning_rate": PEAK, "min_lr": FLOOR, "adam_beta1": BETA1, "adam_beta2": BETA2, "adam_eps": EPS}
    runs.train(arguments(run, conversations, stage=0, weight_decay=DECAY, **settings))

    expected = [scheduled(step) for step in range(1, STEPS + 1)]
    assert [record["lr"] for record in steps(run)] == pytest.approx(expected)
    saved = [state(run / "checkpoints" / checkpoint.name_of(step)) for step in range(1, STEPS + 1)]
    names = [name for kind, name in saved[0] if kind == "master" and "proj" not in name and "norm" not in name]
    for step in range(2, STEPS + 1):
        before, after = saved[step - 2], saved[step - 1]
        used = []
        for name in names:
            mean = after["exp_avg", name].double() / (1 - BETA1**step)
            square = after["exp_avg_sq", name].double() / (1 - BETA2**step)
            # The decay of the weights themselves is a thousandth of this where there is a gradient.
            direction = mean / (square.sqrt() + EPS) + DECAY * before["master", name].double()
            moved = before["master", name].double() - after["master", name].double()
            used.append((moved / direction)[direction.abs() > 0.1])
        assert torch.cat(used).median().item() == pytest.approx(scheduled(step), rel=1e-3), f"step {step}"
