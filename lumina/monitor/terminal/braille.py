"""Curves in a terminal: two by four dots to a character (Unicode's braille patterns)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # rows from the top, columns from the left
Points = Sequence[tuple[float, float]]


def plot(curves: Sequence[tuple[Points, str]], width: int, height: int) -> list[Text]:
    """`height` lines of `width` characters with every curve, (points, style), on one scale; its top and bottom values
    stand at the left. A later curve is drawn over an earlier one. No finite point: no lines."""
    finite = [(x, y) for points, _ in curves for x, y in points if math.isfinite(y)]
    if not finite:
        return []
    left, right = min(x for x, _ in finite), max(x for x, _ in finite)
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"] if height > 1 else [f"{high:.4g}"]
    margin = max(map(len, labels)) + 1
    columns = max(1, width - margin)
    cells = [[0] * columns for _ in range(height)]
    styles = [[""] * columns for _ in range(height)]
    for points, style in curves:
        for column, row in _dots(points, (left, right), (low, high), 2 * columns, 4 * height):
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
            styles[row // 4][column // 2] = style
    lines = []
    for label, row_cells, row_styles in zip(labels, cells, styles, strict=True):
        text = Text.assemble((f"{label:>{margin - 1}} ", "dim"))
        for cell, style in zip(row_cells, row_styles, strict=True):
            text.append(chr(0x2800 + cell) if cell else " ", style=style or None)
        lines.append(text)
    return lines


def _dots(
    points: Points, x_span: tuple[float, float], y_span: tuple[float, float], columns: int, rows: int
) -> list[tuple[int, int]]:
    """(column, row) of the dots of a curve: its points joined by lines, and in each column every row between its
    lowest and its highest value."""
    spans: dict[int, tuple[int, int]] = {}

    def cover(column: int, row: int) -> None:
        above, below = spans.get(column, (row, row))
        spans[column] = min(above, row), max(below, row)

    before: tuple[int, int] | None = None
    for x, y in points:
        if not math.isfinite(y):
            before = None  # a gap
            continue
        column, row = _scaled(x, x_span, columns), rows - 1 - _scaled(y, y_span, rows)
        if before is not None:
            first, from_row = before
            for between in range(first + 1, column):
                cover(between, round(from_row + (row - from_row) * (between - first) / (column - first)))
        cover(column, row)
        before = column, row
    return [(column, row) for column, (above, below) in spans.items() for row in range(above, below + 1)]


def _scaled(value: float, span: tuple[float, float], count: int) -> int:
    low, high = span
    return round((value - low) / (high - low) * (count - 1)) if high > low else (count - 1) // 2
