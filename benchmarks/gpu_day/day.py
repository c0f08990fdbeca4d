"""What a part of the day writes with, and how it is run: as a process of its own that can be ended at any moment."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "results.jsonl"

# The smallest model that has every operator; with Lumina's own vocabulary, so that real text can be trained on.
TINY = ("hidden_size=64", "num_layers=2", "num_heads=2", "num_kv_heads=1", "seq_length=64", "intermediate_size=128")


#: What the parts import; lumina.kernels first: without it there is no day.
NEEDED = (
    "lumina.kernels",
    "torch", "triton", "deepspeed", "pydantic", "orjson", "pyarrow", "safetensors", "tiktoken", "yaml", "rich",
    "psutil", "ninja", "packaging", "transformers", "accelerate",
)  # fmt: skip


def missing() -> list[str]:
    """What cannot be imported, and why."""
    found = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


class Day:
    """One part's sheet. Every figure is on disk, as a line of RESULTS, before the next one is measured."""

    def __init__(self, part: str, results: Path, rehearse: bool) -> None:
        self.part, self.results, self.rehearse = part, results, rehearse
        self.failures = 0

    def record(self, case: str, **figures: Any) -> None:
        """A measurement."""
        self._write({"case": case, **figures})

    def check(self, case: str, ok: bool, **figures: Any) -> None:
        """A claim that holds or does not; the part fails with one that does not."""
        self.failures += not ok
        self._write({"case": case, "ok": bool(ok), **figures})

    def skip(self, case: str, why: str) -> None:
        """What was not done, and why."""
        self._write({"case": case, "skipped": why})

    def attempt(self, case: str, work: Callable[[], Any]) -> Any:
        """`work()`; None when it raised, which is written down and does not end the part."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.failures += 1
            first = str(error).splitlines()[0] if str(error) else ""
            self._write({"case": case, "ok": False, "error": f"{type(error).__name__}: {first}"[:300]})
            return None

    def _write(self, row: dict[str, Any]) -> None:
        row = {"part": self.part, **row}
        with (self.results / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=float) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(" ".join(f"{key}={value}" for key, value in row.items() if key != "part"), flush=True)

    @property
    def context(self) -> Any:
        """How processes start: bare on a GPU, whose driver does not survive a fork; forked with everything imported
        already in a rehearsal."""
        return multiprocessing.get_context("fork" if self.rehearse else "spawn")


def preload() -> None:
    """Import what every part imports, once, for the processes that a rehearsal forks."""
    import accelerate
    import torch._dynamo
    import transformers

    import lumina.infer
    import lumina.train.run
    from lumina.train.deepspeed import import_deepspeed

    import_deepspeed()
    assert all((torch._dynamo, transformers.Trainer, accelerate, lumina.infer, lumina.train.run))


def run_part(name: str, results: Path, rehearse: bool) -> None:
    """A part's process: its output goes to RESULTS/NAME.txt, its exit status says whether every check held."""
    os.setsid()
    log = os.open(results / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    day = Day(name, results, rehearse)
    day.attempt(f"{name}, to its end", lambda: importlib.import_module(f"part_{name}").main(day))
    sys.stdout.flush()
    os._exit(1 if day.failures else 0)  # threads of a process group that is still up do not hold the day up


def run_command(arguments: list[str], log: str, change: Callable[[], None] | None = None) -> None:
    """`lumina ARGUMENTS` as a process's whole life, for `Day.context`: `change` is called first."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(target, stream)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # the part's own group, whose port is taken
    if change is not None:
        change()
    from lumina.cli import main

    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def end(process: Any) -> None:
    """End a part and everything that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def timed(work: Callable[[], Any]) -> float:
    """Seconds of `work()`, the device waited for before and after."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def write_conversations(path: Path, count: int, seed: int = 0) -> Path:
    """`count` made-up conversations of one to three turns, the same ones every time."""
    draw = random.Random(seed)
    words = [
        "the",
        "a",
        "we",
        "they",
        "you",
        "cat",
        "dog",
        "house",
        "water",
        "day",
        "night",
        "small",
        "old",
        "went",
        "saw",
        "said",
        "likes",
        "because",
        "never",
    ]

    def sentence() -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, 25))).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = [(role, sentence()) for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def environment() -> dict[str, Any]:
    """The machine, for the head of the summary. Called in a process of its own: it may initialise CUDA."""
    import torch
    from lumina.kernels import model_step, peers

    found = dict(peers.environment()) | {"card": model_step.card()}
    for name in ("deepspeed", "transformers", "numpy", "pydantic", "liger-kernel", "flash-attn"):
        try:
            found[name] = importlib.import_module("importlib.metadata").version(name)
        except importlib.import_module("importlib.metadata").PackageNotFoundError:
            found[name] = "not installed"
    found["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return found
