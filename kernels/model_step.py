"""End to end: a whole training step of a preset by each path of the model's one door (`bench --model PRESET`).

The door reads LUMINA_KERNELS once per process, so each path is a process of its own. This is the one file here that
knows the model; it is part of the benchmark and nothing imports it but that.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time

import torch


def time_step(preset: str, repeats: int, tokens: int | None = None, vocabulary: int | None = None) -> dict[str, object]:
    """Median seconds of forward, backward and AdamW of one packed row of a preset, in this process's path.

    bf16 on a GPU, float32 on a CPU; `tokens` (default: the preset's sequence) and `vocabulary` shrink it for tests.
    """
    config = importlib.import_module("lumina.config").load(preset, {}, [])
    if vocabulary is not None:
        config.vocab_size = vocabulary
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = importlib.import_module("lumina.model").Transformer(config).to(device=device, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    length = tokens or config.seq_length
    ids, targets = (torch.randint(0, config.vocab_size, (1, length), device=device) for _ in range(2))
    positions = torch.arange(length, device=device).view(1, -1)
    boundaries = torch.tensor([0, length], dtype=torch.int32, device=device)
    weights = torch.full((1, length), 1.0 / length, device=device)
    seconds: list[float] = []
    loss = torch.zeros(())
    for _ in range(repeats + 2):
        start = time.perf_counter()
        loss = model(ids, positions, boundaries, length, targets, weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[2:]), "tokens": length, "loss": last, "device": device}


def compare(preset: str, repeats: int) -> int:
    """Print a step's time by each path that this machine has; returns the exit status."""
    paths = ("triton", "torch") if torch.cuda.is_available() else ("auto", "torch")
    print(f"{'path':8}  {'ms/step':>10}  {'tokens/s':>10}  {'loss':>8}")
    for path in paths:
        run = subprocess.run(
            [sys.executable, "-m", "lumina.kernels.model_step", preset, "--repeats", str(repeats)],
            env=os.environ | {"LUMINA_KERNELS": path},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            print(f"error: the step by {path} failed:\n{run.stderr}", file=sys.stderr)
            return 1
        found = json.loads(run.stdout.splitlines()[-1])
        rate = found["tokens"] / found["seconds"]
        print(
            f"{path:8}  {found['seconds'] * 1e3:10.2f}  {rate:10.0f}  {found['loss']:8.4f}  {found['device']}",
            flush=True,
        )
    return 0


def main() -> None:
    """One path's measurement as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m lumina.kernels.model_step")
    parser.add_argument("preset")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocabulary", type=int)
    options = parser.parse_args()
    print(json.dumps(time_step(options.preset, options.repeats, options.tokens, options.vocabulary)))


if __name__ == "__main__":
    main()
