"""Comparison of runs in a report: their ranking by the best evaluation, and the settings that differ. Plain HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from pydantic import ValidationError

from lumina.config import ModelConfig
from lumina.monitor.reports.run_data import RunData
from lumina.monitor.reports.tables import Column, table

# Settings that make another thing of an evaluation's loss: over other data, or in other units.
_EVALUATED_ON = ("eval_data", "eval_fraction", "objective", "tokenizer", "chat_template", "vocab_size")
_OF_THE_RUN = ("experiment_name", "output_dir")  # every run has its own


def ranking(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The runs by their best evaluation loss, those without one last; the best is marked."""
    figures = ("best evaluation loss", "at step", "step", "parameters", "tokens seen", "duration")
    run, state = Column("run"), Column("state")
    best, at, last, size, tokens, time = (Column(title, "n") for title in figures)
    order = sorted(range(len(runs)), key=lambda i: (_best(runs[i]), i))
    rows, marked = [], set()
    for place, number in enumerate(order):
        summary, loss = runs[number].summary, _best(runs[number])
        if math.isfinite(loss) and loss == _best(runs[order[0]]):
            marked.add(place)
        chip = f'<span class="chip" style="background: var(--c{number % 8})"></span>'
        rows.append(
            {
                run: f"{chip}{escape(names[number])}" + (" (best)" if place in marked else ""),
                best: f"{loss:.4f}" if math.isfinite(loss) else "none",
                at: "" if summary["best_step"] is None else f"{summary['best_step']:,}",
                last: f"{summary['step']:,}",
                size: parameters(runs[number]),
                tokens: f"{runs[number].tokens:,}",
                time: duration(runs[number].seconds),
                state: escape(summary["state"]),
            }
        )
    other = [key for key in _EVALUATED_ON if len({str(one.config.get(key)) for one in runs}) > 1]
    note = (
        f'<p class="warn">Not the same evaluation: {escape(", ".join(other))} differ, so the losses do not compare.</p>'
        if other
        else ""
    )
    return "<h2>Ranking</h2>" + note + table([run, best, at, last, size, tokens, time, state], rows, best=marked)


def _best(run: RunData) -> float:
    loss = run.summary["best_eval"]
    return math.inf if loss is None else float(loss)


def differing_settings(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The settings in which the runs differ, but for their names."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    keys = [key for key in keys if key not in _OF_THE_RUN and len({setting(run, key) for run in runs}) > 1]
    if not keys:
        return '<h2>Settings that differ</h2><p class="none">None.</p>'
    what, of_runs = Column("differs"), [Column(name) for name in names]
    rows = [
        {what: escape(key)} | {column: setting(run, key) for column, run in zip(of_runs, runs, strict=True)}
        for key in keys
    ]
    return "<h2>Settings that differ</h2>" + table([what, *of_runs], rows)


def setting(run: RunData, key: str) -> str:
    """A setting's value as HTML."""
    return escape(str(run.config[key])) if key in run.config else "–"


def parameters(run: RunData) -> str:
    """The model's size, such as 124.5 M, by its settings."""
    known = {key: value for key, value in run.config.items() if key in ModelConfig.model_fields}
    try:
        count = ModelConfig.model_validate(known).num_parameters()
    except ValidationError:  # edited by hand, or of another version
        return "unknown"
    shown = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    return shown + (f", LoRA of rank {run.config['lora_rank']}" if run.config.get("lora_rank") else "")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest of them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def data_name(config: Mapping[str, Any]) -> str:
    """The training files by their names."""
    files = config.get("train_data") or [source.get("path", "") for source in config.get("data") or []]
    names = [PurePath(str(path)).name for path in ([files] if isinstance(files, str) else files)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "unknown"
