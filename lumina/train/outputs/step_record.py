"""What is written down of a step: for the health rules, and for metrics.jsonl and the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from lumina.data import StepData
from lumina.monitor import StepRecord
from lumina.train.deepspeed.timing import PHASES
from lumina.train.health import StepObservation
from lumina.train.recovery.recovery import Verdict

if TYPE_CHECKING:
    from lumina.train.run import Run

Memory = tuple[int, int, str]  # bytes used, bytes there are, label for the console


def used_memory(device: torch.device) -> Memory:
    """A GPU's most, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(device).total_memory, "GPU"
    return psutil.Process().memory_info().rss, psutil.virtual_memory().total, "Mem"


def record_step(
    run: Run,
    data: StepData,
    loss: float,
    lr: float,
    grad_norm: float,
    applied: bool,
    verdict: Verdict | None,
    split: dict[str, float],
    samples: str,
    ended: float,
    loss_scale: float | None,
) -> None:
    """Show a step to the health rules, and write it down on rank 0. split: its seconds by phase; samples:
    lumina.data.samples_id; ended: when, in seconds since 1970; loss_scale: fp16's. The speed counts all of a
    step's time but what saving and evaluating took."""
    if run.metrics is None:
        return
    if run.machine is not None and (machine := run.machine.latest()) is not None:
        run.health.machine(machine)
    seconds = sum(split.get(phase, 0.0) for phase in PHASES if phase not in ("saving", "evaluation"))
    used, total, kind = used_memory(run.engine.device)
    seen = StepObservation(
        data.step + 1,
        loss,
        grad_norm,
        applied,
        data.tokens / seconds,
        split["data"],
        seconds,
        used,
        verdict,
        loss_scale=loss_scale,
    )
    record = StepRecord(
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
        health=run.health.step(seen),
        time=ended,
        applied=applied,
        samples=samples,
        supervised_tokens_per_s=data.supervised_tokens / seconds,
        seconds={name: round(value, 6) for name, value in split.items()},
        mfu=run.utilisation.of(data.micro_batches, seconds),
    )
    run.metrics.step(record)
    run.console.step(record)
