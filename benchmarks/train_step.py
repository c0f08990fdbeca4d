"""A training step of the debug shape on a CPU, beside transformers' Trainer.

    python benchmarks/train_step.py --peer hf_trainer_cpu.py                  one process, every token supervised
    python benchmarks/train_step.py --peer hf_trainer_cpu.py --supervised 0.5 half of the tokens supervised, as in chats
    python benchmarks/train_step.py --peer hf_trainer_cpu.py --processes 2    two processes, ZeRO-2
    python benchmarks/train_step.py --peer hf_trainer_cpu.py --batch 4 --seq 1024 --memory   peak memory, not speed

The peer is a script that trains LlamaForCausalLM of the same shape with Trainer in bf16, reads SEQ, BS and DS from the
environment and ends with a line holding `tokens_per_s=`. Both run in turn, `--rounds` times each, on the same cores;
the last line is the ratio of the medians. Without --peer only Lumina is measured.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def worker(arguments: argparse.Namespace) -> None:
    """Train for a few steps on random tokens through Lumina's own engine and print the median's tokens/s."""
    from lumina.model import Transformer, keep_heap

    keep_heap()
    import torch

    from lumina.config import deepspeed as ds_json
    from lumina.config import load
    from lumina.data.dataset import TorchBatch
    from lumina.train import engine

    ranks = engine.join()
    flags = {"precision": "bf16", "batch_size": arguments.batch, "gradient_accumulation_steps": 1}
    config = load("debug", flags, [f"seq_length={arguments.seq}"])
    settings, _, config = ds_json.resolve(config, ranks.world, "cpu")
    torch.manual_seed(0)
    trainer = engine.Engine(Transformer(config), config, settings)
    tokens = arguments.batch * arguments.seq
    bounds = torch.arange(0, tokens + 1, arguments.seq, dtype=torch.int32)
    positions = torch.arange(arguments.seq).repeat(arguments.batch)
    seconds = []
    for step in range(arguments.steps):
        ids = torch.randint(0, config.vocab_size, (tokens,))
        weights = (torch.rand(tokens) < arguments.supervised).float()
        batch = TorchBatch(ids, ids.roll(-1), weights, positions, bounds, arguments.seq)
        trainer.set_lr(1e-4)
        began = time.perf_counter()
        trainer.accumulate(batch, ranks.world / float(weights.sum() * ranks.world), last=True)
        trainer.step()
        if step >= 3:
            seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if ranks.main:
        median = statistics.median(seconds)
        print(f"lumina step_median_s={median:.3f} peak_gib={peak:.2f} tokens_per_s={tokens * ranks.world / median:.0f}")
    engine.leave()
    engine.end_process(0)


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(tokens/s, peak GiB of the largest process) of a command whose last lines report tokens_per_s."""
    done = subprocess.run(
        ["/usr/bin/env", "time", "-f", "maxrss_kib=%M", *command] if _has_time() else command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = re.findall(r"tokens_per_s=(\d+)", done.stdout)
    if done.returncode or not found:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    rss = re.findall(r"maxrss_kib=(\d+)", done.stdout)
    return float(found[-1]), float(rss[-1]) / 2**20 if rss else float("nan")


def _has_time() -> bool:
    return subprocess.run(["/usr/bin/env", "time", "--version"], capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="path of the peer's script")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of tokens with a loss (default 1)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="compare peak memory instead of speed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    several = arguments.processes > 1
    start = ["deepspeed", "--num_gpus", str(arguments.processes)] if several else [sys.executable]
    shape = [f"--{name}={getattr(arguments, name)}" for name in ("supervised", "batch", "seq", "steps")]
    own = [*start, str(Path(__file__).resolve()), "--worker", *shape]
    environment = {"SEQ": str(arguments.seq), "BS": str(arguments.batch), "STEPS": str(arguments.steps)}
    if several:
        environment |= {"DS": "1", "OMP_NUM_THREADS": "1"}
    results: dict[str, list[tuple[float, float]]] = {"lumina": [], "peer": []}
    for _ in range(arguments.rounds):
        results["lumina"].append(measure(own, environment))
        print(f"lumina  {results['lumina'][-1][0]:6.0f} tokens/s  {results['lumina'][-1][1]:5.2f} GiB", flush=True)
        if arguments.peer:
            results["peer"].append(measure([*start, arguments.peer], environment))
            print(f"peer    {results['peer'][-1][0]:6.0f} tokens/s  {results['peer'][-1][1]:5.2f} GiB", flush=True)
    if arguments.peer:
        column = 1 if arguments.memory else 0
        ours, theirs = (statistics.median(r[column] for r in results[name]) for name in ("lumina", "peer"))
        print(f"ratio {ours / theirs:.2f}x the peer's {'peak memory' if arguments.memory else 'tokens/s'}")


if __name__ == "__main__":
    main()
