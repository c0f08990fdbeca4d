"""End to end: whole training steps of a preset through the DeepSpeed engine that `lumina train` uses.

    python -m lumina.kernels.model_step 1b --batch 4 [--stage 2] [--compile] [--set KEY=VALUE ...]

A line of JSON: seconds a step over steps that are not waited for singly, tokens/s, MFU (None for a device whose peak is
not known, and for every CPU), the most memory, and the card. `bench --model PRESET` runs it once by each path of the
model's one door, which reads LUMINA_KERNELS once per process. This is the one file here that knows the engine; it is
part of the benchmark, and only benchmarks import it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

WARM = 3  # steps that allocate, compile and tune


@dataclass(frozen=True)
class Options:
    """What is timed: samples of a micro-batch, each of `seq_length` tokens; the rest as in Lumina's configuration."""

    preset: str
    sets: tuple[str, ...] = ()
    batch: int = 1
    accumulation: int = 1
    stage: int | None = None  # None: 0 on one process, 2 on several
    precision: str = "auto"
    compile: bool = False
    supervised: float = 1.0  # share of tokens with a loss
    drawn_on: str = "cpu"  # "cuda" draws other weights, in less time
    steps: int = 10
    vocabulary: int | None = None  # smaller than the tokenizer's, for tests


@dataclass(frozen=True)
class StepTime:
    """One rank's figures. tokens: of all ranks in a step; peak: bytes, of a GPU's allocator or of this process."""

    preset: str
    path: str
    card: str
    precision: str
    stage: int
    compiled: bool
    parameters: int
    world: int
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    peak: int
    loss: float  # a supervised token's, of the last step


def card() -> str:
    """The GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        name = ""
    return f"CPU {name or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


class Trainer:
    """The engine of a run, and random batches for it. Joins the process group; `close` before another is made."""

    def __init__(self, options: Options) -> None:
        engines = importlib.import_module("lumina.train.deepspeed")
        ds_json = importlib.import_module("lumina.config.deepspeed")
        model = importlib.import_module("lumina.model")
        model.keep_heap()
        self.ranks = engines.init_process_group()
        flags = {
            "batch_size": options.batch,
            "gradient_accumulation_steps": options.accumulation,
            "precision": options.precision,
        }
        config = importlib.import_module("lumina.config").load(options.preset, flags, options.sets)
        if options.vocabulary is not None:
            config = config.replace(vocab_size=options.vocabulary)
        document = ds_json.default_json(self.ranks.world)
        if options.stage is not None:
            document["zero_optimization"]["stage"] = options.stage
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings, _, self.config = ds_json.resolve(config, self.ranks.world, device, document=document)
        self.precision = next((n for n in ("bf16", "fp16") if settings.get(n, {}).get("enabled")), "fp32")
        torch.manual_seed(0)
        partitioned = engines.partition_on_init(settings, True)  # as the run does it
        with torch.device(options.drawn_on), partitioned:
            transformer = model.Transformer(self.config)
        if self.config.float8 is not None:
            float8 = importlib.import_module("lumina.model.float8")
            float8.check(self.config)
            float8.convert(transformer, self.config.float8)
        transformer.checkpoint_every = self.config.checkpoint_every
        if options.compile:
            transformer.compile_blocks()
        self.options = options
        self.engine = engines.Engine(transformer, self.config, settings)
        self.engine.set_lr(1e-4)

    def batch(self, seed: int) -> Any:
        """A micro-batch of random tokens: documents that fill the context, a part of them supervised."""
        numpy = importlib.import_module("numpy")
        batch = importlib.import_module("lumina.data").Batch
        draw, seq_length = numpy.random.default_rng(seed), self.config.seq_length
        tokens = self.options.batch * seq_length
        ids = draw.integers(self.config.vocab_size, size=tokens)
        weights = (draw.random(tokens) < self.options.supervised).astype(numpy.float32)
        weights[0] = 1.0
        positions = numpy.tile(numpy.arange(seq_length), self.options.batch)
        edges = numpy.arange(0, tokens + 1, seq_length, dtype=numpy.int32)
        return batch(ids, numpy.roll(ids, -1), weights, positions, edges, seq_length).torch()

    def step(self, micro_batches: Sequence[Any]) -> torch.Tensor:
        """One optimizer step; returns the loss of a supervised token on the engine's device."""
        units = sum(batch.units for batch in micro_batches)
        loss = torch.zeros((), device=self.engine.device)
        for number, batch in enumerate(micro_batches, 1):
            loss += self.engine.accumulate(batch, 1 / units, last=number == len(micro_batches))[0]
        self.engine.step()
        return loss

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs of a step over the device's peak, None where no peak is known."""
        if not torch.cuda.is_available():
            return None
        workload = importlib.import_module("lumina.plan.costs.workload")
        device = importlib.import_module("lumina.plan.costs.devices").local_device()
        peak = None if device is None else device.peak.get(self.precision)
        options, config = self.options, self.config
        setup = importlib.import_module("lumina.plan.costs.setup").Setup(
            options.batch, options.accumulation, self.ranks.world, self.precision, supervised=options.supervised
        )
        flops = workload.flops_per_token(config, setup).model * self.tokens
        return None if peak is None else float(flops / seconds / peak)

    @property
    def tokens(self) -> int:
        """Of this rank in a step."""
        return int(self.options.batch * self.options.accumulation * self.config.seq_length)

    def close(self) -> None:
        self.engine.close()
        del self.engine
        gc.collect()  # DeepSpeed's engine refers to itself: else the next peak contains it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def peak_memory() -> int:
    """Bytes: the most that the GPU's allocator held, or this process's largest resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_step(options: Options, trainer: Trainer | None = None) -> StepTime:
    """Time `options.steps` steps after WARM others, all of them at once: the host may run ahead as in training."""
    own = trainer is None
    trainer = trainer or Trainer(options)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    batches = [[trainer.batch(seed) for seed in range(n, n + options.accumulation)] for n in range(2)]
    for number in range(WARM):
        loss = trainer.step(batches[number % 2])
    _wait()
    began = time.perf_counter()
    for number in range(options.steps):
        loss = trainer.step(batches[number % 2])
    _wait()
    seconds = (time.perf_counter() - began) / options.steps
    tokens = trainer.tokens * trainer.ranks.world
    found = StepTime(
        preset=options.preset,
        path=os.environ.get("LUMINA_KERNELS", "auto"),
        card=card(),
        precision=trainer.precision,
        stage=trainer.engine.stage,
        compiled=options.compile,
        parameters=trainer.config.num_parameters(),
        world=trainer.ranks.world,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        mfu=trainer.mfu(seconds),
        peak=peak_memory(),
        loss=float(loss),
    )
    if own:
        trainer.close()
    return found


def line(found: dict[str, Any]) -> str:
    """One measurement in a table's row."""
    mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return (
        f"{found['preset']:8}  {found['path']:8}  {found['precision']:5}  ZeRO-{found['stage']}  "
        f"{'compile' if found['compiled'] else 'eager':7}  {found['seconds'] * 1e3:10.2f} ms  "
        f"{found['tokens_per_second']:10.0f} tokens/s  {mfu:>6}  {found['peak'] / 2**30:6.2f} GiB  "
        f"loss {found['loss']:7.4f}  {found['card']}"
    )


def compare(preset: str, repeats: int, words: Sequence[str] = ()) -> int:
    """Print a step's time by each path that this machine has; returns the exit status. `words` are passed on."""
    paths = ("triton", "torch") if torch.cuda.is_available() else ("auto", "torch")
    for path in paths:
        run = subprocess.run(
            [sys.executable, "-m", "lumina.kernels.model_step", preset, "--steps", str(repeats), *words],
            env=os.environ | {"LUMINA_KERNELS": path},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            print(f"error: the step by {path} failed:\n{run.stderr}", file=sys.stderr)
            return 1
        print(line(json.loads(run.stdout.splitlines()[-1])), flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line; benchmarks/train_step.py has the same options."""
    parse = argparse.ArgumentParser(prog="python -m lumina.kernels.model_step", description=__doc__.split("\n")[0])
    parse.add_argument("preset")
    add_options(parse)
    return parse


def add_options(parse: argparse.ArgumentParser) -> None:
    """Everything of `Options` but the preset."""
    add = parse.add_argument
    add("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    add("--batch", type=int, default=1, help="samples of a micro-batch")
    add("--accumulation", type=int, default=1, help="micro-batches of a step")
    add("--stage", type=int, choices=range(4), help="ZeRO stage")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--compile", action="store_true")
    add("--supervised", type=float, default=1.0, help="share of tokens with a loss")
    add("--steps", type=int, default=10)
    add("--vocabulary", type=int, help=argparse.SUPPRESS)


def options_of(arguments: argparse.Namespace) -> Options:
    """The parsed command line."""
    values = {name: getattr(arguments, name) for name in Options.__dataclass_fields__}
    return Options(**values | {"sets": tuple(values["sets"])})


def main() -> None:
    """One path's measurement as a line of JSON."""
    print(json.dumps(asdict(time_step(options_of(parser().parse_args())))))


if __name__ == "__main__":
    main()
