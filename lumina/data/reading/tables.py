"""CSV and TSV -> records by their headers."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from typing import Any

from lumina.data.reading.streams import lines_of
from lumina.data.records.fault import WRONG_TYPE, Fault

BROKEN_TABLE = "broken CSV"


def read_table(chunks: Iterator[bytes | Fault], delimiter: str) -> Iterator[tuple[int, int, Any]]:
    """Rows as records by their headers. A field may be of any length; one too many is a fault."""
    csv.field_size_limit(sys.maxsize)
    broken: list[Fault] = []

    def lines() -> Iterator[str]:
        for line in lines_of(chunks):
            if isinstance(line, Fault):
                broken.append(line)
            else:
                yield line.decode("utf-8-sig", "surrogateescape")

    rows = csv.DictReader(lines(), delimiter=delimiter, strict=True)
    try:
        names = rows.fieldnames or ()
    except csv.Error as error:
        yield (1, 0, Fault(BROKEN_TABLE, f"the header: {error}; no row is read"))
        return
    if len(set(names)) < len(names):
        yield (1, 0, Fault(BROKEN_TABLE, "two columns have one name"))
        return
    number = 0
    while True:
        number += 1
        try:
            row: dict[Any, Any] | None = next(rows, None)
        except csv.Error as error:  # where the next row begins cannot be told: half a field would be taught
            yield (number, 0, Fault(BROKEN_TABLE, f"row {number}: {error}; no row after it is read"))
            break
        if row is None:
            break
        size = sum(len(value) for value in row.values() if isinstance(value, str))
        if None in row or None in row.values():
            yield (number, size, Fault(WRONG_TYPE, f"row {number} has not as many fields as there are headers"))
            continue
        try:
            for value in row.values():
                value.encode()
        except UnicodeEncodeError:
            yield (number, size, Fault(BROKEN_TABLE, f"row {number} is not UTF-8"))
        else:
            yield (number, size, {name: value or None for name, value in row.items()})
    yield from ((number + i, 0, fault) for i, fault in enumerate(broken))
