"""`--measure`: a few real steps of the real training command on this machine, timed, instead of figures of a device.

The run is the configuration as it stands, in a folder that is thrown away. The first steps (compilation of DeepSpeed's
ops, warm-up of the allocator) are not counted. Where the counted ones are over soon, a second run adds more, to four
minutes: the cores of a cloud host change their speed by 10% and more from one minute to the next. Steps with few
supervised tokens take half as long as others, so the mean is moved to their share in the whole data.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina.config import Config, UserError, usable_cpus
from lumina.monitor import read_metrics
from lumina.processes import how_it_ended

WARM_UP = 5
COUNTED = 20
ENOUGH = 240.0  # seconds of counted steps
WORDS = ("the", "a", "we", "they", "you", "cat", "dog", "house", "water", "day", "night", "small", "old", "went", "saw")


@dataclass(frozen=True)
class MeasuredSteps:
    """What the timed steps took. seconds: of a step, on average; spread: (max - min) / mean; memory: bytes, the largest
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


def measure(config: Config, processes: int, document_tokens: int | None, supervised: float) -> MeasuredSteps:
    """Train WARM_UP + COUNTED steps or more with `processes` processes here. supervised: the share of the tokens with a
    loss, in the whole data or to be made up. UserError when a run fails."""
    made_up = not (config.train_data or config.data)
    with tempfile.TemporaryDirectory(prefix="lumina-measure-") as folder:
        if made_up:
            data = _made_up(Path(folder) / "data.jsonl", config, document_tokens, supervised)
            config = config.replace(train_data=[str(data)])
        config = config.replace(output_dir=folder, cache_dir=config.cache_dir or str(Path(folder) / "cache"))
        steps, global_batch = _timed(config, processes, "run", COUNTED)
        passed = sum(map(_seconds, steps))
        if passed < ENOUGH:
            more = math.ceil((ENOUGH - passed) * len(steps) / passed)
            steps += _timed(config, processes, "longer", more)[0]
        return summarise(steps, processes, global_batch, None if made_up else supervised)


def _timed(config: Config, processes: int, name: str, steps: int) -> tuple[list[dict[str, Any]], int]:
    """The records of so many steps after the warm-up, and the global batch size."""
    run = config.replace(
        eval_data=[],
        experiment_name=name,
        resume=None,
        max_steps=WARM_UP + steps,
        epochs=max(config.epochs, WARM_UP + steps),
        save_every_n_batches=10**9,
        early_stopping_patience=None,
    )
    folder = Path(config.output_dir)
    settings = folder / f"{name}.yaml"
    settings.write_text(run.to_yaml(), encoding="utf-8")
    done = subprocess.run(command(processes, settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = folder / name / "metrics.jsonl"
    if done.returncode or not metrics.is_file():
        tail = "\n    ".join(done.stdout.strip().splitlines()[-5:])
        raise UserError(f"the measured run failed ({how_it_ended(done.returncode)}):\n    {tail}")
    resolved = (folder / name / "config.yaml").read_text(encoding="utf-8")
    return counted(read_metrics(metrics)), _global_batch(resolved)


def command(processes: int, settings: Path) -> list[str]:
    """One process runs `lumina train`; several run it under torchrun."""
    train = ["-m", "lumina", "train", "--config", str(settings)]
    if processes == 1:
        return [sys.executable, *train]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *train]


def counted(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The step records of metrics.jsonl without the warm-up. A short last batch of an epoch is left out as well: its
    tokens are fewer than half of the others'. UserError where none is left."""
    steps = [record for record in records if record["kind"] == "step"][WARM_UP:]
    usual = statistics.median(record["tokens"] for record in steps) if steps else 0
    steps = [record for record in steps if record["tokens"] > usual / 2]
    if not steps:
        raise UserError("the training data is too small to measure on", f"It takes {WARM_UP + 1} steps or more.")
    return steps


def _seconds(record: dict[str, Any]) -> float:
    return float(record["tokens"] / record["tokens_per_s"])


def summarise(
    steps: list[dict[str, Any]], processes: int, global_batch: int, supervised: float | None = None
) -> MeasuredSteps:
    """The mean of the counted steps; with `supervised`, the share of the tokens of the whole data that have a loss,
    what it would be at that share: by least squares of a step's seconds on its supervised tokens."""
    seconds = [_seconds(record) for record in steps]
    tokens = statistics.fmean(record["tokens"] for record in steps)
    mean = statistics.fmean(seconds)
    usual = mean
    if supervised is not None:
        counts = [record["supervised_tokens"] for record in steps]
        if len(set(counts)) > 1:
            slope = max(0.0, statistics.linear_regression(counts, seconds).slope)
            usual += slope * (supervised * tokens - statistics.fmean(counts))
    return MeasuredSteps(
        processes=processes,
        steps=len(steps),
        seconds=usual,
        spread=(max(seconds) - min(seconds)) / mean,
        tokens_per_step=tokens,
        global_batch=global_batch,
        memory=max(record["memory"] for record in steps),
    )


def usable_processes(asked: int) -> int:
    """UserError when more processes are asked for than this machine has cores."""
    cores = len(usable_cpus())
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
    answer = max(1, min(words - 1, round(words * supervised)))
    batch = config.global_batch_size or config.batch_size * config.gradient_accumulation_steps * 8
    count = (WARM_UP + COUNTED + 1) * batch * max(1, config.seq_length // (words + 8))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked, answered = (" ".join(draw.choices(WORDS, k=length)) for length in (words - answer, answer))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path
