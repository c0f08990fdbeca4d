"""The tables of a run report: events, starts, sample answers, settings. Plain HTML."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lumina.monitor.reports.run_data import RunData

_EVENTS, _SAMPLES = 1000, 30  # of a run, of a prompt


@dataclass(frozen=True, eq=False)  # two runs may have one name
class Column:
    """A table's column. kind: its cells' class in report.css ("n" for numbers, "text" for running text)."""

    title: str
    kind: str = ""


_RUN = Column("run")


def table(columns: Sequence[Column], rows: Iterable[Mapping[Column, str]], best: Collection[int] = ()) -> str:
    """A table; a row has a cell for each column, already HTML. best: indices of the rows to be marked."""

    def cell(row: Mapping[Column, str], column: Column) -> str:
        return f'<td class="{column.kind}">{row[column]}</td>' if column.kind else f"<td>{row[column]}</td>"

    lines = ""
    for number, row in enumerate(rows):
        opening = '<tr class="best">' if number in best else "<tr>"
        lines += f"{opening}{''.join(cell(row, column) for column in columns)}</tr>"
    openings = ['<th class="n">' if column.kind == "n" else "<th>" for column in columns]
    top = "".join(f"{opening}{escape(column.title)}</th>" for opening, column in zip(openings, columns, strict=True))
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def clock_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _columns(columns: Iterable[Column], runs: Sequence[RunData]) -> list[Column]:
    """With the run's name before them where there are several."""
    return [*([_RUN] if len(runs) > 1 else []), *columns]


def events_table(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The events of each run, the newest thousand."""
    step, clock, level = Column("step", "n"), Column("time", "n"), Column("level")
    what, why, done = Column("what"), Column("why"), Column("what was done")
    rows = []
    for run, name in zip(runs, names, strict=True):
        for event in run.events[-_EVENTS:]:
            given = event.get("level", "info")
            kind = given if given in ("warn", "crit") else "info"
            rows.append(
                {
                    _RUN: escape(name),
                    step: f"{event.get('step', 0):,}",
                    clock: clock_time(event["time"]) if "time" in event else "",
                    level: f'<span class="{kind}">{escape(given)}</span>',
                    what: escape(str(event.get("rule", ""))),
                    why: escape(str(event.get("reason", ""))),
                    done: escape(str(event.get("action", ""))),
                }
            )
    if not rows:
        return '<p class="none">None.</p>'
    return table(_columns([step, clock, level, what, why, done], runs), rows)


def how_it_ended(start: Mapping[str, Any]) -> str:
    end = start.get("end")
    if not end:
        return "killed, or still running"
    return f"{end['state']} at step {end['step']:,}" + (f": {end['reason']}" if end.get("reason") else "")


def starts_table(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """Every start of each run: when, from where, on what, how it ended."""
    clock, from_step, processes, nodes = map(Column, ("time", "from step", "processes", "nodes"))
    host, ended, changed, command = map(Column, ("first host", "ended", "settings changed", "command"))
    rows = []
    for run, name in zip(runs, names, strict=True):
        for start in run.starts:
            differing = ", ".join(f"{key}={value}" for key, value in start.get("changed", {}).items())
            cells = {
                _RUN: name,
                clock: clock_time(start["time"]),
                from_step: f"{start.get('step', 0):,}",
                processes: str(start.get("world", "")),
                nodes: str(start.get("nodes", "")),
                host: str(start.get("host", "")),
                ended: how_it_ended(start),
                changed: differing,
                command: " ".join(start.get("command", [])),
            }
            rows.append({column: escape(text) for column, text in cells.items()})
    if not rows:
        return '<p class="none">Not recorded.</p>'
    return table(_columns([clock, from_step, processes, nodes, host, ended, changed, command], runs), rows)


def positions_table(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The loss by position: of one run at its first, best and newest evaluation, of several at the newest of each."""
    cells: dict[Column, dict[tuple[float, float], str]] = {}
    for run, name in zip(runs, names, strict=True):
        if not run.positions:
            continue
        newest = max(run.positions)
        shown = {newest: name} if len(runs) > 1 else _evaluations_shown(run)
        for step, title in sorted(shown.items()):
            column = Column(f"{title}, step {step:,}", "n")
            cells[column] = {(row["from"], row["to"]): f"{row['loss']:.4f}" for row in run.positions[step]}
        column = Column(f"{name}, tokens" if len(runs) > 1 else "tokens", "n")
        cells[column] = {(row["from"], row["to"]): f"{row['tokens']:,}" for row in run.positions[newest]}
    before = Column("tokens before", "n")
    places = sorted({place for column in cells.values() for place in column})
    rows = [
        {before: f"{place[0]:,} to {place[1]:,}", **{column: of.get(place, "–") for column, of in cells.items()}}
        for place in places
    ]
    return table([before, *cells], rows)


def _evaluations_shown(run: RunData) -> dict[int, str]:
    recorded = min(run.positions)  # an earlier version's evaluations have no losses by position
    first = "first" if recorded == min(run.groups["eval"].x) else "first recorded"
    shown = {recorded: first, max(run.positions): "newest"}
    best = run.summary["best_step"]
    return shown | ({best: "best"} if best in run.positions else {})


def samples_tables(runs: Sequence[RunData], names: Sequence[str]) -> str:
    step_column, answer_column = Column("step", "n"), Column("answer", "text")
    parts = []
    for run, name in zip(runs, names, strict=True):
        prompts: dict[str, list[tuple[int, str]]] = {}
        for record in run.samples:
            for answer in record["answers"]:
                prompts.setdefault(answer["prompt"], []).append((record["step"], answer["answer"]))
        for prompt, answers in prompts.items():
            step = max(1, -(-len(answers) // _SAMPLES))
            kept = answers[::-1][::step]  # the newest is always there
            rows = [{step_column: f"{place:,}", answer_column: escape(answer)} for place, answer in kept]
            title = escape(f"{name}: {prompt}" if len(names) > 1 else prompt)
            shown = table([step_column, answer_column], rows)
            parts.append(f"<details open><summary>{title}</summary>{shown}</details>")
    return "".join(parts) or '<p class="none">None; set sample_prompts to see some.</p>'


def settings_table(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """Every setting of each run."""
    what, of_runs, rows = Column("setting"), [Column(name) for name in names], []
    for key in dict.fromkeys(key for run in runs for key in run.config):
        shown = (escape(str(run.config[key])) if key in run.config else "–" for run in runs)
        rows.append({what: escape(key)} | dict(zip(of_runs, shown, strict=True)))
    return f"<details><summary>All settings</summary>{table([what, *of_runs], rows)}</details>"
