"""`--measure`: a few real steps of the real training command on this machine, timed, instead of figures of a device.

The run is the configuration as it stands, in a folder that is thrown away. The first steps (compilation of DeepSpeed's
ops, warm-up of the allocator) are not counted; the mean of the others is: steps with few supervised tokens take half as
long as others, and a run has its share of both.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina.config import Config, UserError

WARM_UP = 5
COUNTED = 20
WORDS = ("the", "a", "we", "they", "you", "cat", "dog", "house", "water", "day", "night", "small", "old", "went", "saw")


@dataclass(frozen=True)
class Measured:
    """What the timed steps took. seconds: mean of a step; spread: (max - min) / mean; memory: bytes, the largest
    process."""

    processes: int
    steps: int
    seconds: float
    spread: float
    tokens_per_step: float
    global_batch: int
    memory: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds


def measure(config: Config, processes: int, document_tokens: int | None, supervised: float) -> Measured:
    """Train WARM_UP + COUNTED steps with `processes` processes here. UserError when the run fails."""
    with tempfile.TemporaryDirectory(prefix="lumina-measure-") as folder:
        place = Path(folder)
        train_data = config.train_data
        if not (train_data or config.data):
            train_data = [str(_made_up(place / "data.jsonl", config, document_tokens, supervised))]
        run = config.replace(
            train_data=train_data,
            eval_data=[],
            output_dir=folder,
            experiment_name="run",
            resume=None,
            max_steps=WARM_UP + COUNTED,
            epochs=max(config.epochs, WARM_UP + COUNTED),
            save_every_n_batches=10**9,
            early_stopping_patience=None,
            cache_dir=config.cache_dir or str(place / "cache"),
        )
        settings = place / "config.yaml"
        settings.write_text(run.to_yaml(), encoding="utf-8")
        done = subprocess.run(command(processes, settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        metrics = place / "run" / "metrics.jsonl"
        if done.returncode or not metrics.is_file():
            tail = "\n    ".join(done.stdout.strip().splitlines()[-5:])
            raise UserError(f"the measured run failed with exit code {done.returncode}:\n    {tail}")
        lines = metrics.read_text(encoding="utf-8").splitlines()
        resolved = (place / "run" / "config.yaml").read_text(encoding="utf-8")
        return summarise([json.loads(line) for line in lines], processes, _global_batch(resolved))


def command(processes: int, settings: Path) -> list[str]:
    """One process runs `lumina train`; several run it under torchrun."""
    train = ["-m", "lumina", "train", "--config", str(settings)]
    if processes == 1:
        return [sys.executable, *train]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *train]


def summarise(records: list[dict[str, Any]], processes: int, global_batch: int) -> Measured:
    """The step records of metrics.jsonl without the warm-up. A short last batch of an epoch is left out as well: its
    tokens are fewer than half of the others'."""
    steps = [record for record in records if record.get("kind", "step") == "step"][WARM_UP:]
    usual = statistics.median(record["tokens"] for record in steps) if steps else 0
    steps = [record for record in steps if record["tokens"] > usual / 2]
    if not steps:
        raise UserError("the training data is too small to measure on", f"It takes {WARM_UP + 1} steps or more.")
    seconds = [record["tokens"] / record["tokens_per_s"] for record in steps]
    mean = statistics.fmean(seconds)
    return Measured(
        processes=processes,
        steps=len(steps),
        seconds=mean,
        spread=(max(seconds) - min(seconds)) / mean,
        tokens_per_step=statistics.fmean(record["tokens"] for record in steps),
        global_batch=global_batch,
        memory=max(record["memory"] for record in steps),
    )


def usable_processes(asked: int) -> int:
    """UserError when more processes are asked for than this machine has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked > cores:
        raise UserError(f"--measure with {asked} processes on {cores} cores", "Ask for fewer with --gpus-per-node.")
    return asked


def _global_batch(resolved: str) -> int:
    import yaml

    return int(yaml.safe_load(resolved)["global_batch_size"])


def _made_up(path: Path, config: Config, document_tokens: int | None, supervised: float) -> Path:
    """Conversations of common words (about a token each), enough for the measured steps."""
    draw = random.Random(0)
    words = max(4, int(0.9 * min(document_tokens or config.seq_length, config.seq_length)) - 8)
    learnt = max(1, min(words - 1, round(words * supervised)))
    batch = config.global_batch_size or config.batch_size * config.gradient_accumulation_steps * 8
    count = (WARM_UP + COUNTED + 1) * batch * max(1, config.seq_length // (words + 8))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked, answered = (" ".join(draw.choices(WORDS, k=length)) for length in (words - learnt, learnt))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path
