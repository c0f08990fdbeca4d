"""The validation report as lines of text."""

from __future__ import annotations

from typing import Any

from lumina.data.reports.validation import Validation

MOST_SHOWN = 12  # names of formats, roles, languages or scripts: the most frequent ones


def validation_lines(validation: Validation) -> list[str]:
    """Files, account, composition, lengths, what context lengths would cost, and what is worth a look."""
    figures: dict[str, Any] = validation.to_dict()
    out = [f"{path}: {layout}" for path, layout in figures["files"].items()]
    out += validation.account.report(without=("splitting", "packing"))
    for what in ("formats", "roles", "languages", "scripts"):
        if figures[what]:
            frequent = sorted(figures[what].items(), key=lambda entry: (-entry[1], entry[0]))
            shown = ", ".join(f"{name} {count:,}" for name, count in sorted(frequent[:MOST_SHOWN]))
            out.append(f"{what:<15}{shown}" + (", …" if len(frequent) > MOST_SHOWN else ""))
    for name in ("turns", "message_tokens", "conversation_tokens", "supervised_tokens"):
        if figures[name]:
            spread = ", ".join(f"{key} {value:,}" for key, value in figures[name].items())
            out.append(f"{name.replace('_', ' '):<20} {spread}")
    names = [f"{row['seq_length']:,}" for row in figures["context_lengths"]]
    width = max(6, *map(len, names))
    for name, row in zip(names, figures["context_lengths"], strict=True):
        out.append(
            f"seq_length {name:>{width}}: {100 * row['longer']:.2f}% of conversations are longer; truncating "
            f"loses {100 * row['lost']:.2f}% of tokens, splitting none; packed rows about {100 * row['fill']:.1f}% full"
        )
    out.append(f"duplicates     {figures['duplicates']:,}")
    for what, finding in sorted(figures["findings"].items()):
        more = ", …" if finding["count"] > len(finding["first"]) else ""
        out.append(f"  look: {what}: {finding['count']:,} ({', '.join(finding['first'])}{more})")
    return out
