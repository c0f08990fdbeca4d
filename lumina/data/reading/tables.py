"""CSV and TSV -> records by their headers.

A quote that is not escaped breaks its row, and where that row ends cannot be told from the text. What follows is lost,
line by line and counted, up to a line that cannot be the inside of a field: read as the rest of one it breaks, read as
the beginning of a row it is one, of as many fields as there are headers, and another one follows. It may still be the
end of the broken row, unless its first field is quoted: otherwise it is lost too, and reading goes on after it. Half a
field is not taken for a record.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lumina.data.reading import streams
from lumina.data.reading.streams import lines_of
from lumina.data.records.fault import WRONG_TYPE, Fault

BROKEN_TABLE = "broken CSV"
MOST_LINES = 1000  # of a row, when the end of a break is looked for


class _Lines:
    """A file's lines as text, to be looked at ahead or put back. `broken`: where the file ends early."""

    def __init__(self, chunks: Iterator[bytes | Fault]) -> None:
        self._lines = lines_of(chunks)
        self._ahead: deque[str] = deque()
        self.broken: list[Fault] = []

    def take(self) -> str | None:
        """The next line, None at the end."""
        return self._ahead.popleft() if self._ahead else self._read()

    def _read(self) -> str | None:
        for line in self._lines:
            if not isinstance(line, Fault):
                return line.decode("utf-8-sig", "surrogateescape")
            self.broken.append(line)
        return None

    def ahead(self, start: int) -> Iterator[str]:
        """The lines to come from the one with index `start`, which stay to be taken."""
        while True:
            while len(self._ahead) <= start:
                line = self._read()
                if line is None:
                    return
                self._ahead.append(line)
            yield self._ahead[start]
            start += 1

    def put_back(self, lines: list[str]) -> None:
        self._ahead.extendleft(reversed(lines))


class _Reader:
    """Rows of a table; after a row that is broken, `recover` goes to the next one that can be told."""

    def __init__(self, lines: _Lines, delimiter: str) -> None:
        self._lines, self._delimiter = lines, delimiter
        edge = re.escape(delimiter)
        self._quoted = re.compile(rf'(^|{edge})"(?:[^"]|"")*"(?={edge}|\r?\n|$)')
        self._held: list[str] = []  # lines of the row that is being read
        self._ended = False
        self._rows = csv.reader(self._feed(), delimiter=delimiter, strict=True)

    def _feed(self) -> Iterator[str]:
        size = 0  # of the row, in characters: one whose quote never ends could take in gigabytes
        while (line := self._lines.take()) is not None:
            size = len(line) + (size if self._held else 0)
            self._held.append(line)
            if size > streams.LONGEST_LINE:
                break
            yield line
        self._ended = True

    def row(self) -> list[str] | None:
        """The next row, None at the end. csv.Error where it is broken."""
        self._held.clear()
        return next(self._rows, None)

    def recover(self, columns: int) -> int:
        """Skips the rest of a broken row. Returns how many lines that are not blank were lost, its own included."""
        if self._ended:  # a quote was never closed: the lines that it took in may be rows
            self._lines.put_back(self._held[1:])
            del self._held[1:]
        lost = sum(map(_is_text, self._held))
        while next(self._lines.ahead(0), None) is not None:
            length, opens = self._row_ahead(columns)
            if opens:
                break
            lost += sum(_is_text(self._lines.take() or "") for _ in range(max(1, length)))
            if length:
                break
        self._ended = False
        self._rows = csv.reader(self._feed(), delimiter=self._delimiter, strict=True)
        return lost

    def _row_ahead(self, columns: int) -> tuple[int, bool]:
        """How many lines the row takes that begins with the next line, 0 if it may be the inside of a field; and
        whether its first field is quoted."""
        if '"' not in next(self._lines.ahead(0)):
            return 0, False
        length = self._length(0, columns)
        lines = list(islice(self._lines.ahead(0), length))
        rest = islice(self._lines.ahead(length), MOST_LINES)
        follows = not any(map(_is_text, rest)) or self._length(length, columns)
        outside = self._quoted.sub(r"\1", "".join(lines))  # a program that writes CSV quotes a field with a quote in it
        if not length or not follows or '"' in outside or not self._breaks(['"' + lines[0], *lines[1:]]):
            return 0, False
        return length, lines[0].startswith('"')

    def _breaks(self, lines: list[str]) -> bool:
        """Whether a row that begins with these lines is broken within them."""
        ended = False

        def feed() -> Iterator[str]:
            nonlocal ended
            yield from lines
            ended = True

        try:
            next(csv.reader(feed(), delimiter=self._delimiter, strict=True))
        except csv.Error:
            return not ended
        return False

    def _length(self, start: int, columns: int) -> int:
        """How many lines the row takes that begins `start` lines ahead; 0 if it is none of so many fields."""
        rows = csv.reader(islice(self._lines.ahead(start), MOST_LINES), delimiter=self._delimiter, strict=True)
        try:
            return rows.line_num if len(next(filter(None, rows))) == columns else 0
        except (csv.Error, StopIteration):
            return 0


def _is_text(line: str) -> bool:
    return not line.isspace() and line != ""


def read_table(chunks: Iterator[bytes | Fault], delimiter: str) -> Iterator[tuple[int, int, Any]]:
    """(number from 1, bytes, record) of every row. A field may be of any length; a row of another number of fields than
    there are headers is a fault."""
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(chunks)
    reader = _Reader(lines, delimiter)
    try:
        names = reader.row() or []
    except csv.Error as error:
        yield 1, 0, Fault(BROKEN_TABLE, f"the header: {error}; no row is read")
        return
    if len(set(names)) < len(names):
        yield 1, 0, Fault(BROKEN_TABLE, "two columns have one name")
        return
    number = 0
    while True:
        try:
            row = reader.row()
        except csv.Error as error:
            broken = number + 1
            for _ in range(reader.recover(len(names))):
                number += 1
                where = f"row {broken}: {error}" if number == broken else f"it cannot be told from broken row {broken}"
                yield number, 0, Fault(BROKEN_TABLE, where)
            continue
        if row is None:
            break
        if row:  # an empty line is no row
            number += 1
            yield number, sum(map(len, row)), _record(names, row, number)
    yield from ((number + i, 0, fault) for i, fault in enumerate(lines.broken, 1))


def _record(names: list[str], row: list[str], number: int) -> dict[str, str | None] | Fault:
    if len(row) != len(names):
        return Fault(WRONG_TYPE, f"row {number} has not as many fields as there are headers")
    try:
        for value in row:
            value.encode()
    except UnicodeEncodeError:
        return Fault(BROKEN_TABLE, f"row {number} is not UTF-8")
    return {name: value or None for name, value in zip(names, row, strict=True)}
