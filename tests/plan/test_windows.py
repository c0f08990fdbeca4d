"""The table of the longest rows in docs/long-context.md is what its command prints, and each row is the longest."""

from __future__ import annotations

from pathlib import Path

from lumina.plan.costs.devices import find_device
from lumina.plan.windows import GPUS, STEP, longest, peak, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "long-context.md"


def test_the_document_has_the_table() -> None:
    assert "\n".join(table()) in DOCUMENT.read_text(encoding="utf-8")


def test_a_longer_row_does_not_fit() -> None:
    memory = find_device("h100").memory
    for gpus in GPUS:
        tokens = longest(gpus)
        assert peak(tokens, gpus).device <= memory < peak(tokens + STEP, gpus).device
