"""The charts of a run report: which curves are drawn, from thinned data that the page carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lumina.monitor.events import RECOVERY
from lumina.monitor.reports.run_data import RunData, thinned
from lumina.monitor.reports.tables import how_it_ended

_VALUES = 220_000  # of all curves together, some 9 bytes each: three runs stay under 3 MB with the rest
_BUCKETS = 1000  # a curve on a wide screen shows no more
_MARKS = 300  # on the curves
_SECONDS = ("data", "forward", "backward", "communication", "exchange", "optimizer", "saving", "other")


@dataclass(frozen=True)
class _Chart:
    """A chart of the report: columns of a group of records, with a curve's label each ("" for the run's name). Where
    several columns are drawn, each run has a chart of its own."""

    section: str
    title: str
    group: str
    columns: Mapping[str, str]
    format: str = "number"
    log: bool = False  # a logarithmic scale
    smooth: bool = False  # the reader may smooth it
    points: bool = False  # each value is marked
    stepped: bool = False  # a value holds until the next
    evaluation: bool = False  # with the same figure of the evaluations beside it


_CHARTS = [
    _Chart("train", "Training loss", "step", {"loss": ""}, smooth=True, evaluation=True),
    _Chart("train", "Evaluation loss", "eval", {"loss": ""}, points=True),
    _Chart("train", "Reward margin", "step", {"rewards/margins": ""}, smooth=True, evaluation=True),
    _Chart("train", "Reward accuracy", "step", {"rewards/accuracies": ""}, smooth=True, evaluation=True),
    _Chart("train", "Rewards", "step", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, smooth=True),
    _Chart("train", "Learning rate", "step", {"lr": ""}),
    _Chart("train", "Gradient norm", "step", {"grad_norm": ""}, smooth=True, log=True),
    _Chart("train", "Expert load, the largest over the mean", "step", {"experts/load": ""}, smooth=True),
    _Chart("train", "Experts without a token", "step", {"experts/idle": ""}, smooth=True),
    _Chart("train", "Router entropy, nats", "step", {"experts/entropy": ""}, smooth=True),
    _Chart("train", "Load-balancing loss", "step", {"experts/loss": ""}, smooth=True),
    _Chart("speed", "Tokens/s", "step", {"tokens_per_s": ""}, smooth=True),
    _Chart("speed", "Supervised tokens/s", "step", {"supervised_tokens_per_s": ""}, smooth=True),
    _Chart("speed", "Memory of rank 0's device", "step", {"memory": ""}, format="bytes"),
    _Chart("speed", "Model FLOPs utilisation", "step", {"mfu": ""}, smooth=True),
    _Chart("speed", "Processes", "world", {"processes": ""}, stepped=True),
    _Chart("speed", "Seconds of a step", "step", {f"seconds/{n}": n for n in _SECONDS}, smooth=True, format="seconds"),
    _Chart(
        "speed",
        "Bytes that rank 0 sent to those that share its rows, a step",
        "step",
        {"exchanged_bytes": ""},
        format="bytes",
    ),
    _Chart("system", "Processor", "system", {"cpu": "all cores", "process_cpu": "rank 0"}, format="percent"),
    _Chart("system", "Memory", "system", {"memory": "machine", "process_memory": "rank 0"}, format="bytes"),
    _Chart("system", "Free disk", "system", {"disk_free": "free"}, format="bytes"),
    _Chart(
        "system",
        "Disk and network",
        "system",
        {"disk_read": "read", "disk_write": "written", "net_sent": "sent", "net_received": "received"},
        format="bytes_per_s",
    ),
]


def chart_data(runs: Sequence[RunData], names: Sequence[str]) -> dict[str, Any]:
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
    for chart in _CHARTS:
        look = {key: True for key in ("points", "stepped") if getattr(chart, key)}
        series = [
            {
                "run": number,
                "group": chart.group,
                "column": column,
                "label": label or _label(chart, names, number),
                **look,
            }
            for number, run in enumerate(runs)
            for column, label in chart.columns.items()
            if any(value is not None for value in run.column(chart.group, column))
        ]
        if chart.evaluation and series:
            (column,) = chart.columns
            series += [
                {"run": i, "group": "eval", "column": column, "label": _of("evaluation", names, i), "evaluation": True}
                for i, run in enumerate(runs)
                if any(value is not None for value in run.column("eval", column))
            ]
        options = {key: True for key in ("smooth", "log") if getattr(chart, key)}
        shared = {"section": chart.section, "format": chart.format, **options}
        if len(chart.columns) == 1:
            charts += [{**shared, "title": chart.title, "series": series, "byRun": True}] if series else []
            continue
        for number, name in enumerate(names):
            own = [one for one in series if one["run"] == number]
            charts += [{**shared, "title": _titled(chart.title, name, names), "series": own}] if own else []
    return charts + _gpu_charts(runs, names) + _layer_charts(runs, names)


def _label(chart: _Chart, names: Sequence[str], number: int) -> str:
    """What the legend calls the one curve of a run in a chart."""
    if chart.evaluation:
        return _of("training", names, number)
    return names[number] if len(names) > 1 else chart.title


def _of(what: str, names: Sequence[str], number: int) -> str:
    return f"{names[number]}, {what}" if len(names) > 1 else what


def _titled(title: str, name: str, names: Sequence[str]) -> str:
    return f"{title} · {name}" if len(names) > 1 else title


def _gpu_charts(runs: Sequence[RunData], names: Sequence[str]) -> list[dict[str, Any]]:
    formats = {"utilisation": "percent", "memory": "bytes", "temperature": "celsius", "power": "number"}
    return _charts_by_figure(
        runs, names, "system", "system", lambda column: column.split("/")[0].startswith("gpu"), formats
    )


def _layer_charts(runs: Sequence[RunData], names: Sequence[str]) -> list[dict[str, Any]]:
    return _charts_by_figure(runs, names, "layers", "layers", lambda column: "/" in column, {}, log=True)


def _charts_by_figure(
    runs: Sequence[RunData],
    names: Sequence[str],
    section: str,
    group: str,
    member: Callable[[str], bool],
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
            found.append({"step": event.get("step", 0), "level": level, "text": _event_text(event)[:300]})
    order = {"crit": 0, "warn": 1, "info": 2}
    found = sorted(found, key=lambda mark: order.get(mark["level"], 2))[:_MARKS]
    for before, start in zip(run.starts, run.starts[1:], strict=False):
        text = f"started again on {start.get('world', '?')} process(es); before: {how_it_ended(before)}"
        found.append({"step": start.get("step", 0), "level": "start", "text": text})
    return found


def _event_text(event: Mapping[str, Any]) -> str:
    action = event.get("action")
    return f"{event.get('rule', '')}: {event.get('reason', '')}" + (f" → {action}" if action else "")
