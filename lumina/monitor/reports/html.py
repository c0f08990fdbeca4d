"""`lumina report`: one HTML file about a run, or several compared. It opens offline and asks the network for nothing.

The tables are plain HTML. The curves are drawn by uPlot, which the file carries, from thinned data in it.
"""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from lumina.config import UserError
from lumina.files import write_text
from lumina.monitor.reports.charts import chart_data
from lumina.monitor.reports.comparison import data_name, differing_settings, duration, parameters, ranking
from lumina.monitor.reports.run_data import RunData, read
from lumina.monitor.reports.runs import span
from lumina.monitor.reports.tables import (
    clock_time,
    events_table,
    positions_table,
    samples_tables,
    settings_table,
    starts_table,
)
from lumina.terminal import say


def report_command(folders: Sequence[Path], out: Path | None, *, show: bool) -> int:
    """Write the report of `folders` to `out`, or beside the first run; with `show` open it in a browser."""
    runs = [read(folder) for folder in folders]
    out = out or runs[0].folder / "report.html"
    html = render(runs)
    try:
        write_text(out, html, follow=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}", "Choose another file with --out.") from None
    say(f"Report of {', '.join(run.name for run in runs)}: {out} ({len(html.encode()) / 1e6:.2f} MB)")
    if show and not webbrowser.open(out.resolve().as_uri()):
        say("No browser was found to open it in.")
    return 0


def render(runs: Sequence[RunData]) -> str:
    """The report as one HTML document."""
    names = _names(runs)
    asset = resources.files("lumina.monitor.reports").joinpath("assets")

    def own(name: str) -> str:
        return asset.joinpath(name).read_text(encoding="utf-8")

    style = own("uPlot.min.css") + own("report.css")
    # Inside a script only `</script` and `<!--` could end it early; JSON may write < as an escape anywhere.
    data = json.dumps(chart_data(runs, names), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    title = "Run report: " + ", ".join(names)
    body = [
        f"<h1>{escape(title)}</h1>",
        *([ranking(runs, names), differing_settings(runs, names)] if len(runs) > 1 else []),
        f'<div class="runs">{"".join(map(_card, runs, names, range(len(runs))))}</div>',
        _bar(names),
        *_section("train", "Learning"),
        *(_positions(runs, names) if any(run.positions for run in runs) else []),
        *_section("speed", "Speed and memory"),
        *(_section("layers", "Layers") if any("layers" in run.groups for run in runs) else []),
        *_section("system", "Machine"),
        "<h2>Events</h2>",
        events_table(runs, names),
        "<h2>Starts</h2>",
        starts_table(runs, names),
        "<h2>Sample answers</h2>",
        samples_tables(runs, names),
        "<h2>Settings</h2>",
        settings_table(runs, names),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # without it a browser asks the server for /favicon.ico
        f"<style>{style}</style></head><body>{''.join(body)}"
        f'<script type="application/json" id="data">{data}</script>'
        f"<script>{own('uPlot.iife.min.js')}</script>"
        f"<script>{own('report.js')}</script></body></html>\n"
    )


def _names(runs: Sequence[RunData]) -> list[str]:
    """The runs' names, with their parents' where two are the same."""
    names = [run.name for run in runs]
    return [f"{run.folder.parent.name}/{run.name}" if names.count(run.name) > 1 else run.name for run in runs]


def _section(name: str, title: str) -> list[str]:
    return [f"<h2>{title}</h2>", f'<div class="charts" data-section="{name}"></div>']


def _positions(runs: Sequence[RunData], names: Sequence[str]) -> list[str]:
    return [
        "<h2>Evaluation loss by position</h2>",
        '<p class="soft">Nats per supervised token, by how many tokens of its document come before it.</p>',
        positions_table(runs, names),
    ]


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
    summary = run.summary
    total = f" of {summary['total_steps']:,}" if summary["total_steps"] else ""
    best = "none" if summary["best_eval"] is None else f"{summary['best_eval']:.4f} at step {summary['best_step']:,}"
    rates = [value for value in run.column("step", "tokens_per_s") if value is not None]
    code = run.starts[-1].get("code", {}) if run.starts else {}
    end = run.starts[-1].get("end", {}) if run.starts else {}
    rows = {
        "state": summary["state"] + (f": {end['reason']}" if end.get("reason") else ""),
        "step": f"{summary['step']:,}{total}",
        "parameters": parameters(run),
        "tokens seen": f"{run.tokens:,}",
        "duration": duration(run.seconds),
        "best evaluation": best,
        "tokens/s": f"{sorted(rates)[len(rates) // 2]:,.0f} (median)" if rates else "none",
        "started": f"{clock_time(run.starts[0]['time'])}, {len(run.starts)} time(s)" if run.starts else "unknown",
        "last written": f"{span(summary['age'])} before this report",
        "data": f"{data_name(run.config)}, fingerprint {str(run.run.get('data_fingerprint', 'unknown'))[:16]}",
        "code": " ".join(
            (code.get("lumina", "unknown"), code.get("commit", "")[:12], "(changed)" if code.get("changed") else "")
        ),
    }
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows.items())
    chip = f'<span class="chip" style="background: var(--c{number % 8})"></span>'
    return f'<div class="card"><h3>{chip}{escape(name)}</h3><dl>{lines}</dl></div>'
