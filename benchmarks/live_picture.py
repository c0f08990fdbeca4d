"""A picture of the live view: a real run in a real terminal (tmux), captured while it trains, drawn by rich as SVG.

    python benchmarks/live_picture.py --out docs/live.svg

The run is the nano preset made narrow (64 x 2), on the dialogues of chitchat-dataset, so that a laptop core takes a
step a second; it is stopped when the picture is taken. What tmux has on its screen, colours included, is what is drawn:
nothing is left out or changed. Needs tmux and `make quickstart`'s packages.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lumina.monitor import read_metrics

WIDTH, HEIGHT = 110, 28
# rich's page for a picture, without the web fonts that it would fetch: a monospaced font of the reader's own does.
PAGE = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: {char_height}px;
  line-height: {line_height}px; font-variant-east-asian: full-width; white-space: pre; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    parser.add_argument("--at", type=int, default=75, help="the step after which the picture is taken")
    parser.add_argument("--steps", type=int, default=100, help="the steps of the run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        screen = capture(Path(folder), arguments.at, arguments.steps)
    draw(screen, arguments.out)


def capture(folder: Path, at: int, steps: int) -> str:
    """The terminal's screen, with its colours, once the run has recorded step `at`."""
    subprocess.run([sys.executable, "-m", "lumina.data.chitchat", "data"], check=True, cwd=folder)
    lines = (folder / "data" / "chitchat.eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "data" / "chitchat.eval.jsonl").write_text("".join(lines[:8]))  # an evaluation in seconds
    run = folder / "experiments" / "chat"
    settings = {"eval_every_n_batches": 15, "save_every_n_batches": 30, "num_workers": 1, "seq_length": 128}
    settings |= {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    train = [sys.executable, "-m", "lumina", "train", "--config", "nano", "--experiment-name", run.name]
    train += ["--train-data", "data/chitchat.train.jsonl", "--eval-data", "data/chitchat.eval.jsonl"]
    train += ["--batch-size", "2", "--grad-accum", "1", "--lr", "1e-2", "--max-steps", str(steps)]
    train += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    tmux = ["tmux", "-S", str(folder / "tmux")]
    start = [*tmux, "new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), *train]
    subprocess.run(start, check=True, cwd=folder, env={**os.environ, "TERM": "xterm-256color"})
    try:
        while reached(run / "metrics.jsonl") < at:
            if subprocess.run([*tmux, "has-session"], capture_output=True, check=False).returncode:
                sys.exit("the run ended before its picture could be taken")
            time.sleep(0.5)
        time.sleep(1.5)  # the view draws itself once a second
        shown = subprocess.run([*tmux, "capture-pane", "-p", "-e"], check=True, capture_output=True, text=True)
        return shown.stdout
    finally:
        subprocess.run([*tmux, "kill-server"], check=False, capture_output=True)


def reached(metrics: Path) -> int:
    return max((record["step"] for record in read_metrics(metrics)), default=0) if metrics.exists() else 0


def draw(screen: str, out: Path) -> None:
    console = Console(width=WIDTH, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(Text.from_ansi(screen.rstrip("\n")), overflow="crop", no_wrap=True, highlight=False)
    svg = console.export_svg(title="lumina train", code_format=PAGE, unique_id="live")
    out.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
