"""`lumina process-oasst`: a file of OASST trees or flat messages -> messages JSON lines with provenance."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from lumina.config import UserError
from lumina.data.account import FIRST_LINES
from lumina.data.formats.oasst import count_fields
from lumina.data.oasst.extraction import OasstOptions, extract
from lumina.data.oasst.pairs import extract_pairs
from lumina.data.oasst.trees import malformed
from lumina.data.reading.items import read_items
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import check_inputs
from lumina.data.records.fault import BLANK, Fault
from lumina.data.records.fields import FieldTally
from lumina.files import atomic_file, real_path

NOT_A_TREE = "not an OASST tree or message"


@dataclass
class Summary:
    """What was read, written and left out."""

    source: str
    output: str
    layout: str
    trees: int = 0
    conversations: int = 0
    messages: int = 0
    stopped_early: bool = False
    pairs: bool = False  # what is called conversations here are preference pairs
    discarded: Counter[str] = field(default_factory=Counter)
    bad: dict[str, list[int]] = field(default_factory=dict)  # reason -> [count, first line numbers …]

    def fault(self, reason: str, number: int) -> None:
        entry = self.bad.setdefault(reason, [0])
        entry[0] += 1
        if len(entry) <= FIRST_LINES:
            entry.append(number)

    def to_dict(self) -> dict[str, Any]:
        bad = {reason: {"count": entry[0], "first": entry[1:]} for reason, entry in self.bad.items()}
        return {**vars(self), "discarded": dict(self.discarded), "bad": bad}

    def lines(self) -> list[str]:
        what = "preference pairs" if self.pairs else "conversations"
        return [
            f"{self.source}: {self.layout}, {self.trees:,} trees",
            f"{self.output}: {self.conversations:,} {what}, {self.messages:,} messages"
            + (" (stopped at --max-conversations)" if self.stopped_early else ""),
            *self.left_out(),
        ]

    def left_out(self) -> list[str]:
        """A line for each reason why something was discarded or could not be read."""
        parts = "pairs of replies" if self.pairs else "paths"
        out = [f"  discarded {parts}: {reason}: {count:,}" for reason, count in sorted(self.discarded.items())]
        for reason, (count, *first) in sorted(self.bad.items()):
            out.append(
                f"  bad: {reason}: {count:,} (line {', '.join(map(str, first))}{', …' if count > len(first) else ''})"
            )
        return out


def process_oasst_file(
    source: Path, output: Path, options: OasstOptions, limit: int | None, pairs: bool = False
) -> Summary:
    """Extracts conversations, or preference pairs, into `output`, which appears when it is whole.

    Raises:
        UserError: the input is missing, empty, or holds no tree at all; or nothing passes the options.
    """
    (path,) = check_inputs([source])
    if real_path(path) == real_path(output):
        raise UserError(f"{output} is the input itself", "Name another output file.")
    layout = detect(str(path))
    summary = Summary(str(path), str(output), layout.describe(), pairs=pairs)
    take, tally = extract_pairs if pairs else extract, FieldTally()
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as scratch:
        with scratch.open("wb") as out:
            for item in read_items(str(path), layout):
                if item.record is BLANK:
                    continue
                reason = item.record.reason if isinstance(item.record, Fault) else malformed(item.record)
                if reason is not None:
                    summary.fault(reason if isinstance(item.record, Fault) else NOT_A_TREE, item.number)
                    continue
                fault = count_fields(item.record, tally)
                if fault is not None:
                    summary.fault(fault.reason, item.number)
                    continue
                summary.trees += 1
                extraction = take(item.record, options)
                summary.discarded += extraction.discarded
                for record in extraction.records:
                    if summary.conversations == limit:
                        summary.stopped_early = True
                        break
                    out.write(orjson.dumps(record) + b"\n")
                    summary.conversations += 1
                    summary.messages += sum(
                        len(record.get(key, ())) for key in ("messages", "prompt", "chosen", "rejected")
                    )
                if summary.stopped_early:
                    break
        if not summary.conversations:
            what = (
                f"no {'pair' if pairs else 'path'} passes the options"
                if summary.trees
                else "it holds no OASST trees or messages"
            )
            raise UserError(f"nothing to write from {path}: {what}", "\n  ".join(summary.left_out()) or None)
    return summary
