"""The validation report: one HTML file without scripts, fonts or links, so that it opens offline and asks for nothing.

Plots are inline SVG; colours follow the reader's light or dark setting; the layout narrows to a phone.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from lumina.data.preparing.statistics import LENGTHS, expand_histogram
from lumina.data.reports.validation import Validation

TITLES = {
    "message_tokens": "Tokens of a message",
    "conversation_tokens": "Tokens of a conversation",
    "supervised_tokens": "Supervised tokens of a conversation",
    "turns": "Turns of a conversation",
}
SUMS = ("lines", "messages", "tokens", "fields")  # nothing is split or packed here
MAX_SAMPLES = 20
BINS = 40
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c636b; --page: #fbfbf9; --card: #fff; --line: #dcdfe2;
  --bar: #2f6db3; --supervised: #d8f0dc; --supervised-edge: #2b8a3e;
  --masked: #eef0f2; --masked-edge: #a7adb4; --bad: #b3261e; --shade: #00000040; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e4; --soft: #a4abb3; --page: #16181b; --card: #1e2125;
  --line: #363b41; --bar: #6ea8e6; --supervised: #17381f; --supervised-edge: #51cf66; --masked: #25292e;
  --masked-edge: #6a7279; --bad: #ff8a80; --shade: #ffffff50; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.2rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.tiles, .plots { display: grid; gap: .8rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.tile, figure { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem;
  margin: 0; }
.tile b { display: block; font-size: 1.35rem; } .tile span, figcaption, .soft { color: var(--soft); font-size: .85rem; }
.headline { font-size: 1.05rem; margin: .2rem 0 1rem; }
/* A table wider than the page scrolls, and shows it: a shade at the side where more is, over which the page's own
   colour moves away, and a bar where the system has none of its own. */
.scroll { overflow-x: auto; scrollbar-width: thin; scrollbar-color: var(--soft) transparent;
  background: linear-gradient(90deg, var(--page) 40%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(270deg, var(--page) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(90deg, var(--shade), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(270deg, var(--shade), transparent) right / 1rem 100% no-repeat scroll; }
.scroll::-webkit-scrollbar { height: .5rem; }
.scroll::-webkit-scrollbar-thumb { background: var(--soft); border-radius: .25rem; }
.scroll:focus-visible { outline: 2px solid var(--bar); } td.short { white-space: nowrap; }
td.long { min-width: 14rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } .bad { color: var(--bad); }
svg { width: 100%; height: auto; display: block; } rect.bar { fill: var(--bar); }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg line { stroke: var(--line); }
details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem;
  margin: .5rem 0; }
.turn { white-space: pre-wrap; overflow-wrap: anywhere; border-left: .25rem solid; border-radius: .2rem;
  margin: .4rem 0; padding: .3rem .6rem; }
.supervised { background: var(--supervised); border-color: var(--supervised-edge); }
.masked { background: var(--masked); border-color: var(--masked-edge); }
"""


def render_report(validation: Validation) -> str:
    """The report as one HTML document."""
    account, statistics = validation.account, validation.statistics
    figures, sums = validation.to_dict(), account.sums()
    bad, used = account.bad_lines, account.lines - account.blank_lines
    tiles = {
        "conversations": f"{account.conversations:,}",
        "messages": f"{account.messages:,}",
        "tokens": f"{account.tokens:,}",
        "supervised tokens": f"{account.tokens_supervised:,}",
        "bad lines": f"{bad:,}" + (f" ({share(bad, used)})" if bad else ""),
        "duplicates": f"{figures['duplicates']:,}",
    }
    files = [[path, layout] for path, layout in validation.layouts.items()]
    body = [
        "<h1>Data report</h1>",
        f'<p class="headline{" bad" if bad else ""}">{_headline(validation)}</p>',
        _table(["file", "read as"], files),
        '<div class="tiles">',
        *[f'<div class="tile"><b>{count}</b><span>{what}</span></div>' for what, count in tiles.items()],
        "</div>",
        "<h2>Every line accounted for</h2>",
        f"<pre class='scroll' tabindex='0'>{escape(chr(10).join(sums[name] for name in SUMS))}</pre>",
        f"<h2>Bad lines{f': {bad:,} of {used:,}, {share(bad, used)}' if bad else ''}</h2>",
        _faults(validation, used),
        "<h2>Lengths</h2>",
        '<div class="plots">' + "".join(_plot(TITLES[name], getattr(statistics, name)) for name in (*LENGTHS, "turns")),
        "</div>",
        _percentiles(figures),
        "<h2>What a context length would cost</h2>",
        _context_lengths(figures),
        "<h2>Worth a look</h2>",
        _findings(validation),
        "<h2>Composition</h2>",
        _composition(figures),
        "<h2>A sample, as the model sees it</h2>",
        '<p class="soft"><span class="turn supervised">supervised</span> '
        '<span class="turn masked">context, not supervised</span> Special tokens are not shown.</p>',
        *[_conversation(sample) for sample in statistics.samples[:MAX_SAMPLES]],
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Data report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # without it a browser asks the server for /favicon.ico
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(head: list[str], rows: list[list[Any]]) -> str:
    """A table; numbers right-aligned with separators, and shares in per cent too."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) or str(value).endswith(" %")

    def cell(value: Any) -> str:
        if isinstance(value, int | float):
            shown = f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{round(value):,}"
            return f'<td class="n">{shown}</td>'
        if number(value):
            return f'<td class="n">{escape(value)}</td>'
        long = ' class="long"' if len(str(value)) > 40 else ' class="short"' if len(str(value)) < 20 else ""
        return f"<td{long}>{escape(str(value))}</td>"

    numeric = [number(value) for value in rows[0]] if rows else []
    kinds = [' class="n"' if i < len(numeric) and numeric[i] else "" for i in range(len(head))]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    lines = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def share(part: int, whole: int) -> str:
    """A share in per cent that is neither 0 nor 100 unless it is."""
    percent = 100 * part / max(1, whole)
    if 0 < percent < 0.01:
        return "under 0.01 %"
    if 99.9 < percent < 100:
        return "over 99.9 %"
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.1f} %" if percent < 100 else "100 %"


def _headline(validation: Validation) -> str:
    """Whether the data can be used as it is, in a sentence."""
    account = validation.account
    used = account.lines - account.blank_lines
    if not account.bad_lines:
        return f"All {used:,} lines are used."
    worst = max(account.faults.items(), key=lambda found: found[1].lines)
    return (
        f"{account.bad_lines:,} of {used:,} lines ({share(account.bad_lines, used)}) are bad and left out; "
        f"most often: {escape(worst[0])}."
    )


def _faults(validation: Validation, used: int) -> str:
    """The bad lines by reason, and in each by what exactly is wrong, with an example and where to find it."""
    faults = sorted(validation.account.faults.items(), key=lambda found: -found[1].lines)
    if not faults:
        return "<p>None.</p>"
    rows: list[list[Any]] = []
    for reason, entry in faults:
        kinds = sorted(entry.subreasons.items(), key=lambda kind: -kind[1].lines)
        if not kinds:  # counted by an earlier version
            rows.append([reason, "", entry.lines, share(entry.lines, used), ", ".join(entry.first), entry.example])
        for name, kind in kinds:
            rows.append([reason, name, kind.lines, share(kind.lines, used), kind.first, kind.example])
    return _table(["reason", "what is wrong", "lines", "of all", "first at", "example"], rows)


def _findings(validation: Validation) -> str:
    found = validation.statistics.findings
    if not found:
        return "<p>Nothing.</p>"
    return _table(["what", "count", "first at"], [[w, f.count, ", ".join(f.first)] for w, f in sorted(found.items())])


def _percentiles(figures: Mapping[str, Any]) -> str:
    names = [name for name in TITLES if figures[name]]
    if not names:
        return ""
    keys = list(figures[names[0]])
    return _table(["", *keys], [[TITLES[name], *(figures[name][key] for key in keys)] for name in names])


def _context_lengths(figures: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = [
        [row["seq_length"], *(f"{100 * row[name]:.2f} %" for name in ("longer", "lost", "fill"))]
        for row in figures["context_lengths"]
    ]
    head = ["seq_length", "conversations longer", "tokens lost if truncated (none if split)", "packed rows full, about"]
    return _table(head, rows)


def _composition(figures: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = []
    for what in ("formats", "roles", "languages", "scripts"):
        rows += [[what, name, count] for name, count in sorted(figures[what].items(), key=lambda kv: -kv[1])[:12]]
    return _table(["", "", "count"], rows)


def _plot(title: str, histogram: dict[str, int]) -> str:
    """A histogram on a logarithmic axis of lengths, as SVG."""
    lengths, counts = expand_histogram(histogram)
    if not len(lengths):
        return ""
    low, high = max(1, int(lengths[0])), max(2, int(lengths[-1]))
    edges = np.unique(np.round(np.geomspace(low, high + 1, BINS + 1)).astype(np.int64))
    bins = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(0, len(edges) - 2))
    heights = np.bincount(bins, weights=counts, minlength=max(1, len(edges) - 1))
    tallest = float(heights.max())
    step = 400 / len(heights)
    bars = []
    for i, height in enumerate(heights.tolist()):
        tall = 130 * height / tallest
        label = f"{edges[i]:,}-{edges[min(i + 1, len(edges) - 1)] - 1:,}: {int(height):,}"
        bars.append(
            f'<rect class="bar" x="{i * step + 30:.1f}" y="{145 - tall:.1f}" width="{max(1.0, step - 1):.1f}" '
            f'height="{tall:.1f}"><title>{label}</title></rect>'
        )
    # At the beginning of a bar what it begins with, at the end of the last the greatest length, inside the picture.
    places: dict[int, int] = {}
    for i in ((len(edges) - 1) * k // 4 for k in range(5)):
        places.setdefault(int(lengths[-1] if i == len(heights) else edges[i]), i)
    ticks = "".join(
        f'<text x="{30 + i * step:.0f}" y="162" text-anchor="{"end" if i == len(heights) else "middle"}">'
        f"{length:,}</text>"
        for length, i in places.items()
    )
    return (
        f'<figure><svg viewBox="0 0 450 168" role="img" aria-label="{escape(title)}">'
        f'<line x1="30" y1="145.5" x2="430" y2="145.5"/><text x="30" y="11">{int(tallest):,}</text>'
        f"{''.join(bars)}{ticks}</svg><figcaption>{escape(title)}, logarithmic</figcaption></figure>"
    )


def _conversation(sample: Mapping[str, Any]) -> str:
    turns = "".join(map(_turn, sample["messages"]))
    tools = "".join(f'<div class="turn masked"><b>tools</b> {escape(tool)}</div>' for tool in sample["tools"])
    more = f'<p class="soft">… and {sample["more"]} more</p>' if sample["more"] else ""
    return f"<details open><summary>{escape(str(sample['line']))}</summary>{tools}{turns}{more}</details>"


def _turn(message: Mapping[str, Any]) -> str:
    """A message: its reasoning, content and tool calls, each a block of its own that says what it is."""
    who = " ".join(filter(None, (message["role"], message["name"])))
    said = [(f"{who}, reasoning", message["reasoning"]), (who, message["content"])]
    said += [(f"{who}, tool call", call) for call in message["tool_calls"]]
    shown = [(what, text) for what, text in said if text] or [(who, "")]
    kind = "supervised" if message["supervised"] else "masked"
    return "".join(f'<div class="turn {kind}"><b>{escape(what)}</b> {escape(text)}</div>' for what, text in shown)
