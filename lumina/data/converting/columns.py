"""Column mapping: what a data format calls one thing (`prompt`) stands in a file's column of another name (`question`).

The columns are renamed before a record's format is told, so that all that follows, the count of fields too, is about
the names of the formats. A record that lacks a column keeps its own field of the format's name; one that has both has
the latter set aside, which is counted: the user says which of them is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from lumina.config import FORMATS, UserError, did_you_mean
from lumina.data.reading.items import read_items
from lumina.data.reading.streams import FileLayout
from lumina.data.records.fields import CONTENT, FieldTally
from lumina.data.records.flags import FLAGS, MASKS

Columns = Mapping[str, str]  # field of a format -> column of the file
FIELDS = CONTENT - {*FLAGS, *MASKS} | {"id", "tree_id"}
FIRST_RECORDS = 1000  # looked at to tell whether a file has a column


def renamed(record: Any, columns: Columns, tally: FieldTally) -> Any:
    """The record with its columns under the formats' names; what is no object stays as it is."""
    if not columns or type(record) is not dict:
        return record
    moved = {column: name for name, column in columns.items() if column in record}
    names = set(moved.values())
    out = {}
    for name, value in record.items():
        if name in moved:
            out[moved[name]] = value
        elif name in names:
            tally.set_aside(name)
        else:
            out[name] = value
    return out


def check_columns(path: str, layout: FileLayout, columns: Columns) -> None:
    """Refuses a mapping with names that there are not.

    Raises:
        UserError: a field that no data format has, or a column that none of the file's first records has; but where
            they have the field itself and no column of nearly that name, nothing need be mapped (one of several files
            may be so).
    """
    for name in columns:
        if name not in FIELDS and not FORMATS.added():  # formats of other packages may use any
            raise UserError(
                f"columns: no data format has a field `{name}`.{did_you_mean(name, FIELDS)}",
                "A mapping is FIELD=COLUMN: the format's name first, then the file's (docs/data.md).",
            )
    records = (item.record for item in islice(read_items(path, layout), FIRST_RECORDS))
    keys = dict.fromkeys(str(key) for record in records if type(record) is dict for key in record)
    if not keys:
        return
    for name, column in columns.items():
        near = did_you_mean(column, keys)
        if column not in keys and (near or name not in keys):
            raise UserError(
                f"columns: {path} has no column `{column}` in its first records.{near}",
                f"It has: {', '.join(list(keys)[:20])}.",
            )


def described(columns: Columns) -> str:
    """The mapping in words."""
    return ", ".join(f"{name} from `{column}`" for name, column in columns.items())


def by_file(paths: Iterable[str], columns: Mapping[str, Columns], default: Columns) -> dict[str, Columns]:
    """The mapping of each file that has one: its own, else the `default`."""
    found = {path: columns.get(path, default) for path in paths}
    return {path: mapping for path, mapping in found.items() if mapping}
