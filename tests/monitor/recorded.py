"""Folders of runs that never ran, written as training writes them, with everything that a report shows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from lumina.config import load
from lumina.monitor import HealthStatus, StepRecord

GIB = 2**30
HOSTILE = "</script><script>alert('x')</script><b>&amp;"


def record_run(
    folder: Path,
    steps: int,
    *,
    layers: int = 2,
    seed: int = 0,
    starts: int = 3,
    spike: int | None = None,
    **config: Any,
) -> Path:
    """A run of `steps` steps with an evaluation, layer figures and system figures now and then. The loss is 3 plus a
    falling curve with noise; at `spike` it is 50."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    settings = load("nano", {"train_data": ["chats.jsonl"], **config})
    (folder / "config.yaml").write_text(settings.to_yaml())
    every = max(1, steps // 20)
    with (folder / "metrics.jsonl").open("w") as file:

        def put(kind: str, step: int, **values: Any) -> None:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

        for step in range(1, steps + 1):
            progress = step / steps
            loss = 50.0 if step == spike else 3 + 8 * math.exp(-5 * progress) + rng.gauss(0, 0.1)
            put(
                "step", step, epoch=1, batch=step, batches=steps, loss=loss, lr=1e-4 * (1 - progress) + 1e-6,
                grad_norm=abs(rng.gauss(1, 0.2)), tokens=65536, supervised_tokens=30000,
                tokens_per_s=rng.gauss(1e5, 3e3), supervised_tokens_per_s=rng.gauss(4e4, 1e3), memory=8 << 30,
                memory_total=16 << 30, memory_kind="GPU", health="OK", time=1.7e9 + step, applied=True, mfu=None,
                ppl=math.exp(loss), seconds={"data": 0.01, "forward": 0.2, "backward": 0.4, "optimizer": 0.05},
            )  # fmt: skip
            if step % every == 0:
                evaluated = 3.2 + 8 * math.exp(-5 * progress)
                positions = [
                    {"from": 2**k, "to": 2 ** (k + 1) - 1, "loss": evaluated + 1 / (k + 1), "tokens": 1000 << k}
                    for k in range(21)
                ]
                put("eval", step, loss=evaluated, ppl=30.0, seconds=1.0, by_position=positions)
                layer_figures = {
                    f"blocks.{i}": {"gradient": rng.random(), "weight": 5 + i, "update": 1e-3 * rng.random()}
                    for i in range(layers)
                }
                put("layers", step, layers=layer_figures)
                gpu = {"utilisation": 97, "memory": 9 << 30, "temperature": 71, "power": 400.0}
                figures = {"cpu": 40.0, "process_cpu": 99.0, "memory": 20 << 30, "process_memory": 3 << 30}
                rates = {"net_sent": 1000, "net_received": 2000, "disk_read": 0, "disk_write": 5}
                put("system", step, time=1.7e9 + step, disk_free=1 << 40, gpu0=gpu, **figures, **rates)
    events = [
        {"step": steps // 4, "kind": "health", "level": "warn", "rule": "loss_spike", "reason": f"loss 50 {HOSTILE}"},
        {
            "step": steps // 4,
            "kind": "recovery",
            "level": "info",
            "rule": "loss_spike",
            "reason": "x",
            "action": "skipped",
        },
        {"step": steps // 2, "kind": "health", "level": "crit", "rule": "nan_loss", "reason": "loss is not finite"},
        {"step": steps // 2, "kind": "save", "level": "info", "rule": "checkpoint", "reason": "due"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps({**event, "time": 1.7e9}) + "\n" for event in events))
    with (folder / "samples.jsonl").open("w") as file:
        for step in range(every, steps + 1, every):
            answers = [{"prompt": f"Hello? {HOSTILE}", "answer": f"Answer at {step} {HOSTILE}"}]
            file.write(json.dumps({"step": step, "answers": answers}) + "\n")
    end = {"time": 1.7e9, "state": "failed", "step": steps // 2, "reason": "lost a node"}
    begun = [
        {
            "time": 1.7e9 + i,
            "step": i * steps // starts,
            "total_steps": steps,
            "world": 8 >> i,
            "nodes": 1,
            "host": "node7",
            "pid": 1,
            "changed": {"learning_rate": 2e-4} if i else {},
            "command": ["lumina", "train", HOSTILE],
            "code": {"lumina": "0.1", "commit": "abc"},
            **({"end": end} if i == 0 else {}),
        }
        for i in range(starts)
    ]
    run = {"config": settings.values(), "data_fingerprint": "0123456789abcdef", "starts": begun}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def step_record(**changes: Any) -> StepRecord:
    """Step 150 of the early README, but for `changes`."""
    values: dict[str, Any] = {
        "step": 150,
        "epoch": 1,
        "batch": 150,
        "batches": 2000,
        "loss": 2.456789,
        "lr": 8.5e-5,
        "grad_norm": 0.84321,
        "tokens": 2048,
        "supervised_tokens": 900,
        "tokens_per_s": 1250.4,
        "memory": int(8.2 * GIB),
        "memory_total": 16 * GIB,
        "memory_kind": "GPU",
        "health": HealthStatus(),
        "time": 1.7e9,
    }
    return StepRecord(**(values | changes))
