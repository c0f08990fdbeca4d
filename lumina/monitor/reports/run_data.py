"""A run's files as the report needs them: curves thinned to what a picture can show, events, samples, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lumina.config import UserError, parse_yaml, upgrade
from lumina.files import read_text
from lumina.monitor.events import read_events
from lumina.monitor.metrics import read_metrics
from lumina.monitor.reports.runs import is_run, summary
from lumina.monitor.run_json import read_run

Columns = dict[str, list[float | None]]
_LEFT_OUT = {"step", "time", "epoch", "batch", "batches", "memory_total", "ppl", "applied", "tokens"}


@dataclass
class Group:
    """Curves that share their steps."""

    x: list[int] = field(default_factory=list)
    columns: Columns = field(default_factory=dict)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        self.x.append(step)
        for name, value in _flat(values):
            column = self.columns.setdefault(name, [])
            column.extend([None] * (len(self.x) - 1 - len(column)))
            column.append(value)

    def finish(self) -> None:
        for column in self.columns.values():
            column.extend([None] * (len(self.x) - len(column)))


@dataclass
class RunData:
    """A run: `summary` as `lumina runs` has it, curves by kind, events, sample answers, run.json and settings; tokens:
    those of all steps that count; seconds: that its starts ran; positions: by the steps of evaluations, their loss by
    position, of runs that version 0.2.0 or earlier did not make and whose loss is of single tokens."""

    folder: Path
    summary: dict[str, Any]
    groups: dict[str, Group]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    run: dict[str, Any]
    tokens: int
    seconds: float
    positions: dict[int, list[dict[str, float]]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.run.get("config", {})
        return config

    @property
    def starts(self) -> list[dict[str, Any]]:
        starts: list[dict[str, Any]] = self.run.get("starts", [])
        return starts

    def column(self, group: str, name: str) -> list[float | None]:
        """The values of a curve; none where nothing of it was recorded."""
        return self.groups[group].columns.get(name, []) if group in self.groups else []


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float | None]]:
    found: list[tuple[str, float | None]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, bool) or (not prefix and name in _LEFT_OUT):
            continue
        elif value is None or isinstance(value, int | float):
            found.append((prefix + name, value))
    return found


def read(folder: Path) -> RunData:
    """Read a run's files. Raises UserError where there is no run."""
    folder = folder.resolve()
    if not is_run(folder):
        raise UserError(
            f"{folder} is not a run's folder", "It has config.yaml and metrics.jsonl: give experiments/NAME."
        )
    groups: dict[str, Group] = {}
    tokens, times, positions = 0, list[float](), dict[int, list[dict[str, float]]]()
    for record in read_metrics(folder / "metrics.jsonl"):
        kind, step = record.pop("kind"), record.pop("step")
        group = groups.setdefault(kind, Group())
        if kind == "system" and group.x and group.x[-1] == step:
            continue  # taken by the clock: the first of a step stands for it
        if kind == "step":
            tokens += record.get("tokens", 0)
            times.append(record.get("time", 0.0))
        if kind == "eval" and (of_positions := _positions(record.pop("by_position", None))):
            positions[step] = of_positions
        for figures in record.get("layers", {}).values():
            if figures.get("weight"):
                figures["update_ratio"] = figures["update"] / figures["weight"]
        group.add(step, record)
    for group in groups.values():
        group.finish()
    run = read_run(folder)
    if not run.get("config"):
        run = {**run, "config": _settings(folder / "config.yaml")}
    run["config"] = upgrade(run.get("config", {}), f"{folder}/run.json", warn=False)
    samples = {
        record["step"]: record
        for record in read_events(folder / "samples.jsonl")
        if isinstance(record.get("step"), int) and isinstance(record.get("answers"), list)
    }
    groups["world"] = _world(run.get("starts", []), groups)
    return RunData(
        folder,
        summary(folder),
        groups,
        list(read_events(folder / "events.jsonl")),
        [samples[step] for step in sorted(samples)],
        run,
        tokens,
        _seconds(run.get("starts", []), times),
        positions,
    )


def _positions(recorded: Any) -> list[dict[str, float]]:
    """What an evaluation recorded by position, those entries whose loss is a number."""
    rows = recorded if isinstance(recorded, list) else []
    names = ("from", "to", "loss", "tokens")
    return [row for row in rows if isinstance(row, dict) and all(isinstance(row.get(n), int | float) for n in names)]


def _seconds(starts: Sequence[Mapping[str, Any]], times: Sequence[float]) -> float:
    """How long the starts ran; one that was killed, to the last of the steps that it made (`times`)."""
    total = 0.0
    for start, after in zip(starts, [*(later["time"] for later in starts[1:]), math.inf], strict=False):
        made = [time for time in times if start["time"] <= time < after]
        ended = start["end"]["time"] if start.get("end") else max(made, default=start["time"])
        total += max(0.0, ended - start["time"])
    return total


def _settings(path: Path) -> dict[str, Any]:
    return parse_yaml(read_text(path), str(path))[0]


def _world(starts: Sequence[Mapping[str, Any]], groups: Mapping[str, Group]) -> Group:
    """Processes over steps. Steps that a later start took again belong to it."""
    places: list[tuple[int, int]] = []
    for start in starts:
        places = [place for place in places if place[0] < start["step"]]
        places.append((start["step"], start.get("world", 1)))
    if places and (step := groups.get("step")) and step.x and step.x[-1] > places[-1][0]:
        places.append((step.x[-1], places[-1][1]))
    return Group([x for x, _ in places], {"processes": [float(count) for _, count in places]})


def thinned(group: Group, buckets: int) -> Group:
    """At most two points of each curve for each of `buckets` stretches of steps: its lowest and its highest, so that
    no spike is lost. All curves keep sharing their steps; a point moves by less than a stretch."""
    count = len(group.x)
    if count <= 2 * buckets:
        return Group(group.x, {name: [_short(value) for value in column] for name, column in group.columns.items()})
    edges = np.linspace(0, count, buckets + 1).astype(int)
    x = [group.x[place] for low, high in pairwise(edges) for place in (low, max(low, high - 1))]
    columns = {}
    for name, column in group.columns.items():
        values = np.array([math.nan if value is None else value for value in column])
        thin: list[float | None] = []
        for low, high in pairwise(edges):
            piece = values[low:high]
            if np.isnan(piece).all():
                thin += [None, None]
                continue
            first, second = sorted((int(np.nanargmin(piece)), int(np.nanargmax(piece))))
            thin += [_short(float(piece[first])), _short(float(piece[second]))]
        columns[name] = thin
    return Group(x, columns)


def _short(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.5g}")
