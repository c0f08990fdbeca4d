"""`lumina runs`: state, step and best evaluation of every run in a folder, from its files."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import psutil

from lumina.config import UserError
from lumina.monitor.run_json import read_run
from lumina.terminal import console, json_line, say

_QUIET = 300.0  # seconds without a line in its files after which a run on another machine counts as stale
_TAIL = 1 << 16  # bytes: more than any record is long


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs in `folder`, the one that wrote last first: name, state, step, total_steps, best_eval, best_step, world,
    seconds since it last wrote, and its folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "Give the folder that holds runs, such as experiments.")
    found = [summary(entry) for entry in sorted(folder.iterdir()) if is_run(entry)]
    return sorted(found, key=lambda run: run["age"])


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def summary(folder: Path) -> dict[str, Any]:
    """One run's entry."""
    run = read_run(folder)
    start = run["starts"][-1] if run.get("starts") else {}
    written = max(path.stat().st_mtime for path in (folder / "metrics.jsonl", folder / "run.json") if path.exists())
    age = max(0.0, time.time() - written)
    last = last_record(folder / "metrics.jsonl")
    best = best_evaluation(folder / "metrics.jsonl")
    return {
        "name": folder.name,
        "state": state(start, age),
        "step": last.get("step", start.get("step", 0)),
        "total_steps": start.get("total_steps"),
        "best_eval": best[1] if best else None,
        "best_step": best[0] if best else None,
        "world": start.get("world"),
        "age": round(age, 1),
        "folder": str(folder),
    }


def state(start: Mapping[str, Any], age: float) -> str:
    """State of a run: running, finished, stopped, failed, stale (it ended without a word, or nothing was heard of it),
    or unknown for runs from before run.json."""
    if not start:
        return "unknown"
    if "end" in start:
        return str(start["end"]["state"])
    if start.get("host") == socket.gethostname():
        return "running" if _alive(int(start["pid"]), float(start["time"])) else "stale"
    return "running" if age < _QUIET else "stale"


def _alive(pid: int, since: float) -> bool:
    """Whether the process is there and is not a later one that was given the same number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since
    except psutil.Error:
        return False


def last_record(path: Path) -> dict[str, Any]:
    """The last whole record of a file, read from its end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(record, dict):
            return record
    return {}


def evaluations(path: Path) -> Iterator[tuple[int, float]]:
    """(step, loss) of every evaluation with a finite loss. The other lines are skipped unparsed."""
    with path.open("rb") as file:
        for line in file:
            if b'"kind": "eval"' in line[:40]:
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError:
                    continue
                if record["loss"] is not None:
                    yield record["step"], record["loss"]


def best_evaluation(path: Path) -> tuple[int, float] | None:
    return min(evaluations(path), key=lambda found: found[1], default=None)


def runs_command(folder: Path, *, json: bool = False) -> int:
    """Print the runs in `folder`."""
    runs = list_runs(folder)
    if json:
        say(json_line({"runs": runs}))
        return 0
    from rich.table import Table
    from rich.text import Text

    if not runs:
        say(f"No runs in {folder}.")
        return 0
    colours = {"running": "green", "finished": "blue", "failed": "red", "stale": "yellow"}
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "best eval", "processes", "age"):
        table.add_column(title, justify="left" if title in ("run", "state") else "right")
    for run in runs:
        total = f"/{run['total_steps']:,}" if run["total_steps"] else ""
        best = "" if run["best_eval"] is None else f"{run['best_eval']:.4f} at {run['best_step']:,}"
        name, where = Text(run["name"]), Text(run["state"], style=colours.get(run["state"], ""))
        table.add_row(name, where, f"{run['step']:,}{total}", best, str(run["world"] or ""), span(run["age"]))
    console(soft_wrap=True).print(table)
    return 0


def span(seconds: float) -> str:
    """A time in its largest fitting unit, such as 3 min, 7 h, 2 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
