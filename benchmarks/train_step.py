"""Training steps through Lumina's engine on this machine's GPU or CPU, beside transformers' Trainer.

    python benchmarks/train_step.py                     debug, micro-batches of 2 x 512, without a peer
    python benchmarks/train_step.py --peer PEER         one process, every token supervised
    python benchmarks/train_step.py --peer PEER --supervised 0.5   half of the tokens supervised, as in chats
    python benchmarks/train_step.py --peer PEER --processes 2      two processes, ZeRO-2
    python benchmarks/train_step.py --peer PEER --batch 4 --seq 1024 --memory   peak memory, not speed
    python benchmarks/train_step.py --preset 1b --seq 4096 --batch 4 --compile --peer PEER     on a GPU

PEER is benchmarks/hf_trainer.py, or any script that trains the same shape, reads PRESET, SEQ, BS, STEPS and DS from the
environment and ends with a line holding `tokens_per_s=` (and `peak_gib=`, else the largest process's memory is taken).
Both run in turn, `--rounds` times each, on the same device; the last line is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path


def worker(arguments: argparse.Namespace) -> None:
    """Train for a few steps on random tokens through Lumina's own engine and print tokens/s."""
    from lumina.kernels import model_step

    from lumina.train.deepspeed import startup

    arguments.sets.append(f"seq_length={arguments.seq}")
    trainer = model_step.Trainer(model_step.options_of(arguments))
    found = model_step.time_step(trainer.options, trainer)
    if trainer.ranks.main:
        print(model_step.line(asdict(found)))
        print(f"peak_gib={found.peak / 2**30:.2f} tokens_per_s={found.tokens_per_second:.0f}")
    startup.destroy_process_group()
    startup.end_process(0)


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
    peaks = re.findall(r"peak_gib=([\d.]+)", done.stdout)
    if peaks:
        return float(found[-1]), float(peaks[-1])
    rss = re.findall(r"maxrss_kib=(\d+)", done.stdout)
    return float(found[-1]), float(rss[-1]) / 2**20 if rss else float("nan")


def _has_time() -> bool:
    return subprocess.run(["/usr/bin/env", "time", "--version"], capture_output=True, check=False).returncode == 0


def main() -> None:
    from lumina.kernels import model_step

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="path of the peer's script")
    parser.add_argument("--preset", default="debug")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    model_step.add_options(parser)
    parser.set_defaults(batch=2, steps=12, precision="bf16")
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
    own = [*start, str(Path(__file__).resolve()), "--worker", *sys.argv[1:]]
    environment = {"SEQ": str(arguments.seq), "BS": str(arguments.batch), "STEPS": str(arguments.steps)}
    environment["PRESET"] = arguments.preset
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
