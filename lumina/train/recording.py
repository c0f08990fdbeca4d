"""What is written down of a step: for the health rules, and for metrics.jsonl and the console."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil
import torch

from lumina.data import StepData
from lumina.monitor import StepRecord
from lumina.train.answers import Verdict
from lumina.train.health_rules import StepSeen

if TYPE_CHECKING:
    from lumina.train.run import Run

Memory = tuple[int, int, str]  # bytes used, bytes there are, label for the console


def used_memory(device: torch.device) -> Memory:
    """A GPU's most, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(device).total_memory, "GPU"
    return psutil.Process().memory_info().rss, psutil.virtual_memory().total, "Mem"


def step_seen(
    run: Run,
    data: StepData,
    loss: float,
    grad_norm: float,
    applied: bool,
    verdict: Verdict | None,
    waited: float,
    seconds: float,
    memory: int,
) -> StepSeen:
    """A step as the health rules see it. waited: seconds for its batches, of the `seconds` it took."""
    return StepSeen(
        data.step + 1,
        loss,
        grad_norm,
        applied,
        data.tokens / seconds,
        waited,
        seconds,
        memory,
        verdict,
        loss_scale=run.engine.loss_scale().get("cur_scale"),
    )


def step_record(
    run: Run,
    data: StepData,
    loss: float,
    lr: float,
    grad_norm: float,
    applied: bool,
    health: str,
    seconds: float,
    split: dict[str, float],
    memory: Memory,
    samples: str,
) -> StepRecord:
    """A step as metrics.jsonl stores it. split: its seconds by phase; samples: lumina.data.order.samples_id."""
    used, total, kind = memory
    return StepRecord(
        step=data.step + 1,
        epoch=data.epoch + 1,
        batch=data.batch_in_epoch + 1,
        batches=run.order.steps_per_epoch,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens=data.tokens,
        supervised_tokens=int(data.supervised_tokens),
        tokens_per_s=data.tokens / seconds,
        memory=used,
        memory_total=total,
        memory_kind=kind,
        health=health,
        time=time.time(),
        applied=applied,
        samples=samples,
        supervised_tokens_per_s=data.supervised_tokens / seconds,
        seconds={name: round(value, 6) for name, value in split.items()},
        mfu=run.utilisation.of(data.micro_batches, seconds),
    )
