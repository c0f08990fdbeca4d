"""Time from starting each command to its first word on the terminal, output or log: the aim is three seconds.

    python benchmarks/first_word.py [--runs 3] [COMMAND …]

It trains a tiny model for one step first, for the commands that need one. A command counts as answered at the first
byte of either stream; `serve` and `chat` are ended then. Prints the median of the runs per command, and exits 1 if one
is over the limit. Processor time of other jobs is in the figures: run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 3.0  # seconds
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "seq_length": 64}
QUICK = {**SHAPE, "num_workers": 1, "max_steps": 1, "precision": "fp32", "batch_size": 1, "live_view": "false"}


def lines(place: Path) -> dict[str, list[str]]:
    """The command lines by name. `place` has data.jsonl and the run `trained`."""
    data, run = str(place / "data.jsonl"), str(place / "trained")
    settings = [word for name, value in QUICK.items() for word in ("--set", f"{name}={value}")]
    train = ["train", "--config", "nano", "--train-data", data, "--output-dir", str(place), *settings]
    return {
        "--help": ["--help"],
        "train": [*train, "--experiment-name", f"run-{time.monotonic_ns()}"],
        "train --resume": [*train, "--experiment-name", "trained", "--resume", "auto"],
        "prepare": ["prepare", data, "--cache-dir", str(place / f"cache-{time.monotonic_ns()}")],
        "validate-data": ["validate-data", data],
        "inspect": ["inspect", data],
        "generate": ["generate", "--resume", run, "--prompt", "hello", "--max-length", "4"],
        "chat": ["chat", run],
        "serve": ["serve", run, "--port", "0"],
        "evaluate": ["evaluate", run, "--data", data],
        "export": ["export", run, str(place / f"out-{time.monotonic_ns()}")],
        "import": ["import", str(place / "exported"), str(place / f"in-{time.monotonic_ns()}")],
        "runs": ["runs", str(place)],
        "report": ["report", run],
        "checkpoints list": ["checkpoints", "list", run],
        "checkpoints verify": ["checkpoints", "verify", run],
        "config show": ["config", "show", "nano"],
        "check-environment": ["check-environment"],
        "estimate-time": ["estimate-time", "--config", "nano", "--gpu", "h100"],
        "plan": ["plan", "--config", "nano", "--gpu", "h100"],
        "launch --dry-run": ["launch", "--dry-run", "--", *train],
    }


def first_word(words: list[str], place: Path) -> tuple[float, str]:
    """Seconds to the first byte of either stream, and the text that it came with."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "lumina", *words],
        cwd=place,
        stdin=subprocess.DEVNULL if words[0] != "chat" else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    ready, _, _ = select.select([process.stdout, process.stderr], [], [], 120.0)
    seconds = time.perf_counter() - began
    text = os.read(ready[0].fileno(), 200).decode(errors="replace") if ready else ""
    process.kill()
    process.communicate()
    return seconds, (text.splitlines() or [""])[0][:60]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help="by the names in the table (all)")
    parser.add_argument("--runs", type=int, default=3, help="of each, of which the median counts (3)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        turn = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello to you"}]}
        (place / "data.jsonl").write_text("".join(json.dumps(turn) + "\n" for _ in range(20)))
        base = [sys.executable, "-P", "-m", "lumina"]
        words = lines(place)["train"]
        words[-1] = "trained"
        subprocess.run([*base, *words], cwd=place, check=True, capture_output=True)
        subprocess.run([*base, "export", "trained", "exported"], cwd=place, check=True, capture_output=True)
        over = []
        for name in given.commands or lines(place):
            found = [first_word(lines(place)[name], place) for _ in range(given.runs)]
            seconds = statistics.median(time for time, _ in found)
            print(f"{name:20} {seconds:6.2f} s   {found[-1][1]}", flush=True)
            over += [name] if seconds > LIMIT else []
    print(f"over {LIMIT:g} s: {', '.join(over) or 'none'}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
