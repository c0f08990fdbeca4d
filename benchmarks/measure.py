"""`lumina estimate-time --measure` held to the run that it predicts: training steps, on this machine.

    python benchmarks/measure.py FILE [--presets nano debug] [--processes 1 2] [--steps 200] [--rounds 1]

FILE holds conversations. A step is one micro-batch of --tokens tokens in samples of the preset's own length. For each
preset and number of processes the prediction is made first, from a few steps; then the run is made by the training
command itself, in a temporary folder, and timed from its first step's record to its last. A shared machine changes its
speed between the two and within the run: `tenths` are the fastest and the slowest tenth of the run's steps against its
mean. The last line is the largest error of any prediction; the bar is 10%.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lumina.config import load
from lumina.monitor import read_metrics
from lumina.plan.measure import command


def predicted(preset: str, processes: int, words: list[str], steps: int) -> float:
    """Seconds of that many steps."""
    line = [sys.executable, "-m", "lumina", "estimate-time", "--config", preset, "--measure", "--json", *words]
    done = subprocess.run([*line, "--gpus-per-node", str(processes)], stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["measured"]["seconds"]) * steps


def taken(preset: str, processes: int, words: list[str], steps: int, folder: Path) -> list[float]:
    """Seconds of each step of a real run but the first, whose start has no record."""
    more = ["--max-steps", str(steps), "--output-dir", str(folder), "--experiment-name", "run"]
    line = command(processes, Path("CONFIG"))
    line = [*line[: line.index("--config")], "--config", preset, *words, *more, "--set", "save_every_n_batches=1000000"]
    subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    times = [record["time"] for record in read_metrics(folder / "run" / "metrics.jsonl") if record["kind"] == "step"]
    assert len(times) == steps
    return [after - before for before, after in itertools.pairwise(times)]


def tenths(seconds: list[float]) -> tuple[float, float]:
    """The fastest and the slowest tenth of the steps, one after the other, against the mean of all."""
    size = max(1, len(seconds) // 10)
    means = [statistics.fmean(seconds[at : at + size]) for at in range(0, len(seconds) - size + 1, size)]
    return min(means) / statistics.fmean(seconds) - 1, max(means) / statistics.fmean(seconds) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--presets", nargs="+", default=["nano", "debug"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, help="of a process and step")
    arguments = parser.parse_args()
    steps = arguments.steps
    largest = 0.0
    print(f"| round | preset | processes | predicted, {steps} steps | taken | error | tenths |")
    print("|---|---|---|---|---|---|---|")
    for turn in range(1, arguments.rounds + 1):
        for preset, processes in itertools.product(arguments.presets, arguments.processes):
            batch = max(1, arguments.tokens // load(preset).seq_length)
            with tempfile.TemporaryDirectory() as folder:
                words = ["--train-data", arguments.file, "--batch-size", str(batch), "--grad-accum", "1"]
                words += ["--set", f"cache_dir={folder}/cache"]
                expected = predicted(preset, processes, words, steps)
                seconds = taken(preset, processes, words, steps, Path(folder))
            real = statistics.fmean(seconds) * steps
            fast, slow = tenths(seconds)
            largest = max(largest, abs(expected / real - 1))
            row = [turn, preset, processes, f"{expected:.0f} s", f"{real:.0f} s", f"{expected / real - 1:+.1%}"]
            print("|", " | ".join(map(str, [*row, f"{fast:+.0%} to {slow:+.0%}"])), "|", flush=True)
    print(f"\nlargest error {largest:.1%}")


if __name__ == "__main__":
    main()
