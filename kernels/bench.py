"""`python -m lumina.kernels.bench`: how fast the kernels are, or, without a GPU, what the compiler says about them.

On a GPU: median device times (graph replay, past the L2) beside torch eager, torch.compile and Liger, as fractions of a
copy measured in the same run; `--output-layer` does the same for the output layer and its loss. Without one: the static
table (registers, spills, shared memory, occupancy, bytes, and the time that the bytes alone take at a card's
bandwidth), which says that it is one. `--model PRESET` times whole training steps through the DeepSpeed engine by
each path.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .benchmark import Case
from .cases import OPERATORS, PRESETS, cases, sweep
from .launch import INTERPRETED
from .peers import environment, measure
from .static import CARDS, Card, rows_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Table = list[dict[str, Any]]

STATIC_NOTE = (
    "Static table: no GPU was used. Registers, spills, shared memory and access widths are read from code compiled\n"
    "for each card, occupancy and bytes are computed; predicted_us is bytes / bandwidth, a bound and no measurement."
)
STATIC_COLUMNS = (
    "card", "shape", "op", "direction", "kernel", "warps", "registers", "spills", "shared", "wide", "narrow",
    "occupancy", "bytes_per_element", "limit_per_element", "predicted_us",
)  # fmt: skip
MEASURED_COLUMNS = ("shape", "op", "direction", "rows", "width", "side", "us", "spread", "GB/s", "of_copy", "timed")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(prog="python -m lumina.kernels.bench", description=__doc__.split("\n")[0])
    add = parse.add_argument
    add("--op", action="append", choices=OPERATORS, help="an operator; repeat for several (default: all)")
    add("--shapes", choices=("presets", "sweep"), default="presets")
    names = [shape.name for shape in (*PRESETS, *sweep())]
    add("--only", action="append", choices=names, metavar="SHAPE", help="only this shape; repeat for several")
    add("--dtype", choices=tuple(DTYPES), default="bf16")
    add("--card", action="append", choices=[c.name for c in CARDS], help="static table: only these cards")
    add("--bandwidth", type=float, metavar="GB/S", help="static table: predict for this bandwidth")
    add("--static", action="store_true", help="the static table even where there is a GPU")
    add("--repeats", type=int, default=50, help="timed steps a median is taken of")
    add("--csv", type=Path, metavar="FILE", help="write the table")
    add("--plot", type=Path, metavar="PNG", help="write a chart: fraction of peak over width, by operator")
    add("--output-layer", action="store_true", help="time the output layer and its loss beside Liger's instead")
    add("--model", metavar="PRESET", help="time a training step of this preset by each path instead")
    return parse


def static_table(todo: list[Case], cards: Sequence[Card], bandwidth: float | None) -> Table:
    """The compiled kernels' rows, card by card."""
    return [row.fields() for card in cards for case in todo for row in rows_of(case, card, bandwidth)]


def measured_table(todo: list[Case], device: str, repeats: int) -> Table:
    """Every side of every case, timed; each case is printed as it comes."""
    table: Table = []
    for case in todo:
        rows = [found.fields() for found in measure(case, device, repeats)]
        print_table(rows, MEASURED_COLUMNS, header=not table)
        table += rows
    return table


_WIDTHS = {"op": 14, "kernel": 15, "direction": 9, "shape": 12, "bytes_per_element": 17, "limit_per_element": 17}


def print_table(table: Table, columns: Sequence[str], *, header: bool = True) -> None:
    """Fixed columns on stdout."""
    widths = [_WIDTHS.get(column, max(9, len(column))) for column in columns]
    if header:
        print("  ".join(column.ljust(width) for column, width in zip(columns, widths, strict=True)))
    for row in table:
        cells = ("" if row[column] is None else str(row[column]) for column in columns)
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)


def write_csv(path: Path, table: Table, note: dict[str, str]) -> None:
    """The table, after `# key: value` lines that tell how it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in note.items())
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def write_plot(path: Path, table: Table, *, static: bool) -> None:
    """One panel per operator: fraction of peak over width. A static table has no times, so its fraction is the bytes'
    bound (limit / bytes moved). Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in table:
        if row["bytes_per_element" if static else "of_copy"] is None:
            continue
        label = row["card"] if static else row["side"]
        value = row["limit_per_element"] / row["bytes_per_element"] if static else row["of_copy"]
        lines[row["op"]][f"{label} {row['direction']}"].append((row["width"], value))
    figure, panels = pyplot.subplots(1, len(lines), figsize=(4.5 * len(lines), 4), squeeze=False, sharey=True)
    for panel, (op, series) in zip(panels[0], lines.items(), strict=True):
        for label, points in series.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
        panel.set_xscale("log", base=2)
        panel.set(title=op, xlabel="width", ylim=(0, 1.1))
        panel.legend(fontsize=6)
    panels[0][0].set_ylabel("bytes' bound (static, no GPU): limit / moved" if static else "fraction of copy bandwidth")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.model:
        from .model_step import compare

        return compare(options.model, repeats=min(options.repeats, 20))
    shapes = PRESETS if options.shapes == "presets" else sweep()
    shapes = tuple(shape for shape in shapes if not options.only or shape.name in options.only)
    if not shapes:
        print(f"error: no such shape among the {options.shapes}: {', '.join(options.only)}", file=sys.stderr)
        return 2
    todo = cases(shapes, tuple(options.op or OPERATORS), DTYPES[options.dtype])
    if options.output_layer:
        from .output_layer import run

        return run(shapes, DTYPES[options.dtype], options.repeats, options.csv)
    static = options.static or not torch.cuda.is_available()
    if static and INTERPRETED:
        print("error: kernels are interpreted here; unset LUMINA_KERNELS and TRITON_INTERPRET", file=sys.stderr)
        return 2
    note = environment() | {"command": "python -m lumina.kernels.bench " + " ".join(arguments or sys.argv[1:])}
    if static:
        note = {"static": STATIC_NOTE.replace("\n", " ")} | note
        print(STATIC_NOTE, flush=True)
        cards = [card for card in CARDS if not options.card or card.name in options.card]
        table = static_table(todo, cards, options.bandwidth)
        print_table(table, STATIC_COLUMNS)
    else:
        print("\n".join(f"{key}: {value}" for key, value in note.items()), flush=True)
        table = measured_table(todo, "cuda", options.repeats)
    if options.csv:
        write_csv(options.csv, table, note)
    if options.plot:
        write_plot(options.plot, table, static=static)
    return 0


if __name__ == "__main__":
    sys.exit(main())
