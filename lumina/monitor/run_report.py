"""`lumina report`: one HTML file about a run, or several compared. It opens offline and asks the network for nothing.

The tables are plain HTML. The curves are drawn by uPlot, which the file carries, from thinned data in it.
"""

from __future__ import annotations

import json
import time
import webbrowser
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from lumina.config import UserError
from lumina.files import write_text
from lumina.monitor.events import RECOVERY
from lumina.monitor.run_data import RunData, read, thinned
from lumina.monitor.runs import span

_VALUES = 220_000  # of all curves together, some 9 bytes each: three runs stay under 3 MB with the rest
_BUCKETS = 1000  # a curve on a wide screen shows no more
_MARKS, _EVENTS, _SAMPLES = 300, 1000, 30
_SECONDS = ("data", "forward", "backward", "communication", "optimizer", "saving", "other")
# title, group, columns with labels, settings. Where several columns are drawn, each run has a chart of its own.
_CHARTS: list[tuple[str, str, str, dict[str, str], dict[str, Any]]] = [
    ("train", "Training loss", "step", {"loss": ""}, {"smooth": True, "eval": True}),
    ("train", "Evaluation loss", "eval", {"loss": ""}, {"points": True}),
    ("train", "Learning rate", "step", {"lr": ""}, {}),
    ("train", "Gradient norm", "step", {"grad_norm": ""}, {"smooth": True, "log": True}),
    ("speed", "Tokens/s", "step", {"tokens_per_s": ""}, {"smooth": True}),
    ("speed", "Supervised tokens/s", "step", {"supervised_tokens_per_s": ""}, {"smooth": True}),
    ("speed", "Memory of rank 0's device", "step", {"memory": ""}, {"format": "bytes"}),
    ("speed", "Model FLOPs utilisation", "step", {"mfu": ""}, {"smooth": True}),
    ("speed", "Processes", "world", {"processes": ""}, {"stepped": True}),
    (
        "speed",
        "Seconds of a step",
        "step",
        {f"seconds/{n}": n for n in _SECONDS},
        {"smooth": True, "format": "seconds"},
    ),
    ("system", "Processor", "system", {"cpu": "all cores", "process_cpu": "rank 0"}, {"format": "percent"}),
    ("system", "Memory", "system", {"memory": "machine", "process_memory": "rank 0"}, {"format": "bytes"}),
    ("system", "Free disk", "system", {"disk_free": "free"}, {"format": "bytes"}),
    (
        "system",
        "Disk and network",
        "system",
        {"disk_read": "read", "disk_write": "written", "net_sent": "sent", "net_received": "received"},
        {"format": "bytes_per_s"},
    ),
]


def report_command(folders: Sequence[Path], out: Path | None, *, show: bool) -> int:
    """Write the report of `folders` to `out`, or beside the first run; with `show` open it in a browser."""
    runs = [read(folder) for folder in folders]
    out = out or runs[0].folder / "report.html"
    html = render(runs)
    try:
        write_text(out, html)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", "Choose another file with --out.") from None
    print(f"Report of {', '.join(run.name for run in runs)}: {out} ({len(html.encode()) / 1e6:.2f} MB)")
    if show and not webbrowser.open(out.resolve().as_uri()):
        print("No browser was found to open it in.")
    return 0


def render(runs: Sequence[RunData]) -> str:
    """The report as one HTML document."""
    names = _names(runs)
    asset = resources.files("lumina.monitor").joinpath("assets")
    style = asset.joinpath("uPlot.min.css").read_text() + asset.joinpath("report.css").read_text()
    # Inside a script only `</script` and `<!--` could end it early; JSON may write < as an escape anywhere.
    data = json.dumps(_data(runs, names), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    title = "Run report: " + ", ".join(names)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="runs">{"".join(map(_card, runs, names, range(len(runs))))}</div>',
        _bar(names),
        *_section("train", "Learning"),
        *_section("speed", "Speed and memory"),
        *(_section("layers", "Layers") if any("layers" in run.groups for run in runs) else []),
        *_section("system", "Machine"),
        "<h2>Events</h2>",
        _events(runs, names),
        "<h2>Starts</h2>",
        _starts(runs, names),
        "<h2>Sample answers</h2>",
        _samples(runs, names),
        "<h2>Settings</h2>",
        _settings(runs, names),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # without it a browser asks the server for /favicon.ico
        f"<style>{style}</style></head><body>{''.join(body)}"
        f'<script type="application/json" id="data">{data}</script>'
        f"<script>{asset.joinpath('uPlot.iife.min.js').read_text()}</script>"
        f"<script>{asset.joinpath('report.js').read_text()}</script></body></html>\n"
    )


def _names(runs: Sequence[RunData]) -> list[str]:
    """The runs' names, with their parents' where two are the same."""
    names = [run.name for run in runs]
    return [f"{run.folder.parent.name}/{run.name}" if names.count(run.name) > 1 else run.name for run in runs]


# --- Curves ---


def _data(runs: Sequence[RunData], names: Sequence[str]) -> dict[str, Any]:
    curves = sum(len(group.columns) for run in runs for group in run.groups.values())
    layers = sum(len(run.groups["layers"].columns) for run in runs if "layers" in run.groups)
    # Layers are many: they get a third of the room.
    few = min(_BUCKETS, _VALUES * 2 // 3 // (2 * max(1, curves - layers)))
    many = min(_BUCKETS, _VALUES // 3 // (2 * max(1, layers)))
    packed = []
    for run, name in zip(runs, names, strict=True):
        groups = {}
        for kind, group in run.groups.items():
            thin = thinned(group, max(25, many if kind == "layers" else few))
            groups[kind] = {"x": thin.x, "columns": thin.columns}
        packed.append({"name": name, "groups": groups, "marks": _marks(run)})
    return {"runs": packed, "charts": _charts(runs, names)}


def _charts(runs: Sequence[RunData], names: Sequence[str]) -> list[dict[str, Any]]:
    charts = []
    for section, title, group, columns, settings in _CHARTS:
        options = {key: value for key, value in settings.items() if key not in ("points", "stepped", "eval")}
        look = {key: True for key in ("points", "stepped") if settings.get(key)}
        series = [
            {"run": number, "group": group, "column": column, "label": label or names[number], **look}
            for number, run in enumerate(runs)
            for column, label in columns.items()
            if any(value is not None for value in _column(run, group, column))
        ]
        if settings.get("eval"):
            series += [
                {"run": i, "group": "eval", "column": "loss", "label": f"{names[i]}, evaluation", "dash": [6, 4]}
                for i, run in enumerate(runs)
                if _column(run, "eval", "loss")
            ]
        shared = {"section": section, "format": "number", **options}
        if len(columns) == 1:
            charts += [{**shared, "title": title, "series": series, "byRun": True}] if series else []
            continue
        for number, name in enumerate(names):
            own = [one for one in series if one["run"] == number]
            charts += [{**shared, "title": _titled(title, name, names), "series": own}] if own else []
    return charts + _gpu_charts(runs, names) + _layer_charts(runs, names)


def _column(run: RunData, group: str, column: str) -> list[float | None]:
    return run.groups[group].columns.get(column, []) if group in run.groups else []


def _titled(title: str, name: str, names: Sequence[str]) -> str:
    return f"{title} · {name}" if len(names) > 1 else title


def _gpu_charts(runs: Sequence[RunData], names: Sequence[str]) -> list[dict[str, Any]]:
    formats = {"utilisation": "percent", "memory": "bytes", "temperature": "celsius", "power": "number"}
    return _families(runs, names, "system", "system", lambda column: column.split("/")[0].startswith("gpu"), formats)


def _layer_charts(runs: Sequence[RunData], names: Sequence[str]) -> list[dict[str, Any]]:
    return _families(runs, names, "layers", "layers", lambda column: "/" in column, {}, log=True)


def _families(
    runs: Sequence[RunData],
    names: Sequence[str],
    section: str,
    group: str,
    member: Any,
    formats: Mapping[str, str],
    **options: Any,
) -> list[dict[str, Any]]:
    """A chart for each figure of columns called `what/figure`, with a curve for each `what`."""
    charts = []
    for number, run in enumerate(runs):
        figures: dict[str, list[dict[str, Any]]] = {}
        for column in run.groups[group].columns if group in run.groups else ():
            if member(column):
                what, figure = column.rsplit("/", 1)
                label = what.removeprefix("layers/")
                one = {"run": number, "group": group, "column": column, "label": label}
                figures.setdefault(figure, []).append(one)
        for figure, series in figures.items():
            title = figure.replace("_", " ").capitalize() if group == "layers" else f"GPU {figure}"
            shared = {"section": section, "format": formats.get(figure, "number"), **options}
            charts.append({**shared, "title": _titled(title, names[number], names), "series": series})
    return charts


def _marks(run: RunData) -> list[dict[str, Any]]:
    """What is marked on the curves: warnings, recoveries, restarts; the gravest where they are too many."""
    found = []
    for event in run.events:
        level = event.get("level", "info")
        if level != "info" or event.get("kind") in RECOVERY:
            found.append({"step": event.get("step", 0), "level": level, "text": _told(event)[:300]})
    order = {"crit": 0, "warn": 1, "info": 2}
    found = sorted(found, key=lambda mark: order.get(mark["level"], 2))[:_MARKS]
    for before, start in zip(run.starts, run.starts[1:], strict=False):
        text = f"started again on {start.get('world', '?')} process(es); before: {_end(before)}"
        found.append({"step": start.get("step", 0), "level": "start", "text": text})
    return found


def _told(event: Mapping[str, Any]) -> str:
    action = event.get("action")
    return f"{event.get('rule', '')}: {event.get('reason', '')}" + (f" → {action}" if action else "")


# --- Tables ---


def _section(name: str, title: str) -> list[str]:
    return [f"<h2>{title}</h2>", f'<div class="charts" data-section="{name}"></div>']


def _bar(names: Sequence[str]) -> str:
    choose = "".join(
        f'<label><input type="checkbox" checked data-run="{i}"> <span class="chip" '
        f'style="background: var(--c{i % 8})"></span>{escape(name)}</label>'
        for i, name in enumerate(names)
    )
    return (
        f'<div class="bar">{choose if len(names) > 1 else ""}<label>smoothing <select id="smoothing">'
        '<option value="0">none</option><option value="0.6">a little</option><option value="0.9">more</option>'
        '<option value="0.98">much</option></select></label><button id="reset" type="button">whole run</button>'
        '<span class="soft">drag over a curve to zoom in on all; double-click for the whole run</span></div>'
    )


def _card(run: RunData, name: str, number: int) -> str:
    told = run.summary
    total = f" of {told['total_steps']:,}" if told["total_steps"] else ""
    best = "none" if told["best_eval"] is None else f"{told['best_eval']:.4f} at step {told['best_step']:,}"
    rates = [value for value in _column(run, "step", "tokens_per_s") if value is not None]
    code = run.starts[-1].get("code", {}) if run.starts else {}
    end = run.starts[-1].get("end", {}) if run.starts else {}
    rows = {
        "state": told["state"] + (f": {end['reason']}" if end.get("reason") else ""),
        "step": f"{told['step']:,}{total}",
        "best evaluation": best,
        "tokens/s": f"{sorted(rates)[len(rates) // 2]:,.0f} (median)" if rates else "none",
        "started": f"{_clock(run.starts[0]['time'])}, {len(run.starts)} time(s)" if run.starts else "unknown",
        "last heard of": f"{span(told['age'])} before this report",
        "data": str(run.run.get("data_fingerprint", "unknown"))[:16],
        "code": " ".join(
            (code.get("lumina", "unknown"), code.get("commit", "")[:12], "(changed)" if code.get("changed") else "")
        ),
    }
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows.items())
    chip = f'<span class="chip" style="background: var(--c{number % 8})"></span>'
    return f'<div class="card"><h3>{chip}{escape(name)}</h3><dl>{lines}</dl></div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table of cells that are already HTML."""
    kinds = [f' class="{kind}"' if kind else "" for kind in (*classes, *[""] * (len(head) - len(classes)))]
    lines = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _several(names: Sequence[str], head: Sequence[str]) -> list[str]:
    return ["run", *head] if len(names) > 1 else list(head)


def _events(runs: Sequence[RunData], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        first = [escape(name)] if len(runs) > 1 else []
        for event in run.events[-_EVENTS:]:
            level = event.get("level", "info")
            kind = level if level in ("warn", "crit") else "info"
            told = [escape(str(event.get(key, ""))) for key in ("rule", "reason", "action")]
            when = _clock(event["time"]) if "time" in event else ""
            rows.append(
                [*first, f"{event.get('step', 0):,}", when, f'<span class="{kind}">{escape(level)}</span>', *told]
            )
    if not rows:
        return '<p class="none">None.</p>'
    head = _several(names, ["step", "time", "level", "what", "why", "what was done"])
    return _table(head, rows, ["n", "n"] if len(runs) == 1 else ["", "n", "n"])


def _end(start: Mapping[str, Any]) -> str:
    end = start.get("end")
    if not end:
        return "killed, or still running"
    return f"{end['state']} at step {end['step']:,}" + (f": {end['reason']}" if end.get("reason") else "")


def _starts(runs: Sequence[RunData], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        first = [escape(name)] if len(runs) > 1 else []
        for start in run.starts:
            changed = ", ".join(f"{key}={value}" for key, value in start.get("changed", {}).items())
            cells = [
                _clock(start["time"]),
                f"{start.get('step', 0):,}",
                str(start.get("world", "")),
                str(start.get("nodes", "")),
                str(start.get("host", "")),
                _end(start),
                changed,
                " ".join(start.get("command", [])),
            ]
            rows.append([*first, *map(escape, cells)])
    if not rows:
        return '<p class="none">Not recorded.</p>'
    head = ["time", "from step", "processes", "nodes", "first host", "ended", "settings changed", "command"]
    return _table(_several(names, head), rows)


def _samples(runs: Sequence[RunData], names: Sequence[str]) -> str:
    parts = []
    for run, name in zip(runs, names, strict=True):
        prompts: dict[str, list[tuple[int, str]]] = {}
        for record in run.samples:
            for answer in record["answers"]:
                prompts.setdefault(answer["prompt"], []).append((record["step"], answer["answer"]))
        for prompt, answers in prompts.items():
            step = max(1, -(-len(answers) // _SAMPLES))
            kept = answers[::-1][::step]  # the newest is always there
            rows = [[f"{place:,}", escape(answer)] for place, answer in kept]
            title = escape(f"{name}: {prompt}" if len(names) > 1 else prompt)
            table = _table(["step", "answer"], rows, ["n", "text"])
            parts.append(f"<details open><summary>{title}</summary>{table}</details>")
    return "".join(parts) or '<p class="none">None; set sample_prompts to see some.</p>'


def _settings(runs: Sequence[RunData], names: Sequence[str]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))

    def shown(run: RunData, key: str) -> str:
        return escape(str(run.config[key])) if key in run.config else "–"

    everything = _table(["setting", *names], ([escape(key), *(shown(run, key) for run in runs)] for key in keys))
    whole = f"<details><summary>All settings</summary>{everything}</details>"
    if len(runs) == 1:
        return whole
    differing = [key for key in keys if len({shown(run, key) for run in runs}) > 1]
    rows = ([escape(key), *(shown(run, key) for run in runs)] for key in differing)
    return _table(["differs", *names], rows) + whole
