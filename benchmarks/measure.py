"""`lumina estimate-time --measure` held to the run that it predicts: training steps, on this machine.

    python benchmarks/measure.py FILE [--presets nano debug] [--processes 1 2] [--steps 200] [--rounds 3]

FILE holds conversations. For each preset and number of processes the prediction is made first, from a few steps; then
the run is made by the training command itself, in a temporary folder, and timed from its first step's record to its
last. A shared machine changes its speed between the two, either way, so there are several rounds, each with its own
prediction, and the median of each row is shown. The last line is the largest error of any prediction; the bar is 10%.
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

from lumina.monitor import read_metrics
from lumina.plan.measure import command


def predicted(preset: str, processes: int, words: list[str], steps: int) -> float:
    """Seconds of that many steps."""
    line = [sys.executable, "-m", "lumina", "estimate-time", "--config", preset, "--measure", "--json", *words]
    done = subprocess.run([*line, "--gpus-per-node", str(processes)], stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["measured"]["seconds"]) * steps


def taken(preset: str, processes: int, words: list[str], steps: int, folder: Path) -> float:
    """Seconds of a real run's steps: the first one, whose start has no record, counts as much as the others."""
    more = ["--max-steps", str(steps), "--output-dir", str(folder), "--experiment-name", "run"]
    line = command(processes, Path("CONFIG"))
    line = [*line[: line.index("--config")], "--config", preset, *words, *more, "--set", "save_every_n_batches=1000000"]
    subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    times = [record["time"] for record in read_metrics(folder / "run" / "metrics.jsonl") if record["kind"] == "step"]
    assert len(times) == steps
    return float(times[-1] - times[0]) * steps / (steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--presets", nargs="+", default=["nano", "debug"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-length", type=int, default=256)
    arguments = parser.parse_args()
    steps = arguments.steps
    cases = list(itertools.product(arguments.presets, arguments.processes))
    errors: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    print(f"| round | preset | processes | predicted, {steps} steps | taken | error |\n|---|---|---|---|---|---|")
    for turn in range(1, arguments.rounds + 1):
        for preset, processes in cases:
            with tempfile.TemporaryDirectory() as folder:
                words = ["--train-data", arguments.file, "--batch-size", "1", "--grad-accum", "1", "--set"]
                words += [f"seq_length={arguments.seq_length}", "--set", f"cache_dir={folder}/cache"]
                expected = predicted(preset, processes, words, steps)
                real = taken(preset, processes, words, steps, Path(folder))
            error = expected / real - 1
            errors[preset, processes].append(error)
            print(f"| {turn} | {preset} | {processes} | {expected:.0f} s | {real:.0f} s | {error:+.1%} |", flush=True)
    print("\n| preset | processes | median error |\n|---|---|---|")
    for (preset, processes), found in errors.items():
        print(f"| {preset} | {processes} | {statistics.median(found):+.1%} |")
    print(f"\nlargest error {max(abs(error) for found in errors.values() for error in found):.1%}")


if __name__ == "__main__":
    main()
