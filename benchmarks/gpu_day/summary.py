"""results.jsonl as a page that a person reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from day import RESULTS
from parts import PARTS

Row = dict[str, Any]


def read(results: Path) -> list[Row]:
    """Every whole line; a part that was cut may have left half of one."""
    rows = []
    file = results / RESULTS
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _value(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _line(row: Row) -> str:
    figures = ", ".join(f"{key} {_value(v)}" for key, v in row.items() if key not in ("part", "case", "ok", "skipped"))
    mark = "" if row.get("ok", True) else "**WRONG** "
    why = f"not done: {row['skipped']}" if "skipped" in row else figures
    return f"- {mark}{row['case']}: {why}" if why else f"- {mark}{row['case']}"


def render(head: dict[str, Any], endings: dict[str, tuple[str, float]], rows: list[Row]) -> str:
    """Markdown: the machine, how each part ended, and all figures in the order in which they came."""
    card = head.get("card", "?")
    lines = [f"# {'Rehearsal on ' if head.get('rehearsal') else ''}{card}", ""]
    if head.get("rehearsal"):
        lines += ["A rehearsal: tiny shapes on a CPU. It shows that the parts run; its times mean nothing.", ""]
    lines += [f"- {key}: {value}" for key, value in head.items() if key != "card"]
    lines += [
        "",
        "| part | ended | seconds | limit | checks held | wrong | not done |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in PARTS:
        if part.name in endings:
            own = [row for row in rows if row["part"] == part.name]
            held, wrong = (sum(row.get("ok") is state for row in own) for state in (True, False))
            skipped = sum("skipped" in row for row in own)
            how, seconds = endings[part.name]
            lines.append(f"| {part.name} | {how} | {seconds:.1f} | {part.seconds} | {held} | {wrong} | {skipped} |")
    for part in PARTS:
        own = [row for row in rows if row["part"] == part.name]
        if own:
            lines += ["", f"## {part.name}: {part.what}", ""]
            lines += [f"Shortened in a rehearsal: {part.rehearsed}.", ""] if head.get("rehearsal") else []
            lines += [_line(row) for row in own]
    return "\n".join(lines) + "\n"
