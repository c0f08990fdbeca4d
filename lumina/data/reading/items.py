"""Files -> numbered records: JSON in lines, arrays and any other layout, CSV and TSV, Parquet, Arrow; plain, gzip or
zstd; UTF-8, 16 or 32; streamed.

Plain JSON lines are read by byte ranges, so that several workers share a file; everything else is read from its start
by one. An item's number is its line (JSON lines), record (other JSON) or row (CSV, Parquet, Arrow), from 1.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Generator, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from lumina.config import UserError
from lumina.data.oasst.trees import is_flat_oasst, trees_of
from lumina.data.reading.json_values import WRAPPERS, parse_json, read_values, records_in, several
from lumina.data.reading.streams import LONGEST_LINE, FileLayout, lines_of, read_lines, text_of
from lumina.data.reading.tables import read_table
from lumina.data.records.calls import CALLS, TOOLS
from lumina.data.records.fault import BLANK, EMPTY, TOO_MUCH_MEMORY, Fault

ROWS_AT_ONCE = 512
# A page's kind (2, the dictionary) and bytes, with which its header begins: integers in Thrift's compact protocol.
_PAGE = re.compile(rb"\x15(?P<kind>[\x00-\x7f])\x15(?P<bytes>[\x80-\xff]*[\x00-\x7f])")
_WRAPPERS = frozenset(WRAPPERS)
_SPARSE = frozenset({*TOOLS, *CALLS, "input", "arguments"})


class Item(NamedTuple):
    """A record: `number` says where it begins, `lines` how many of the file's records it takes up, `size` its bytes
    (an estimate for records that were never text)."""

    number: int
    lines: int
    size: int
    record: Any


def read_items(path: str, layout: FileLayout, start: int = 0, stop: int | None = None) -> Iterator[Item]:
    """The file's records; of a splittable file those whose line begins in bytes [start, stop).

    A blank line is the record BLANK. A record that is no JSON is a Fault.
    """
    if layout.flat:
        yield from _trees(read_records(path, layout))
    elif layout.splittable and stop is not None:
        yield from _lines_to_items(read_lines(path, start, stop))
    else:
        yield from read_records(path, layout)


def read_records(path: str, layout: FileLayout) -> Generator[Item, None, None]:
    if layout.container in ("parquet", "arrow", "arrow stream"):
        try:
            yield from _rows(_checked(path, _batches(path, layout.container)))
        except MemoryError:  # Arrow's is an ArrowException too
            raise
        except (pa.ArrowException, OSError) as error:
            remedy = "It is cut short or damaged: copy or download it again."
            if type(error) is pa.ArrowException:  # of no kind, as that of a thread that cannot start
                remedy = (
                    "Where a thread cannot start, the memory that one process may take is used up: leave out the"
                    " longest records, or divide the file. Else it is damaged: copy or download it again."
                )
            raise UserError(f"{path} is a {layout.describe()} file that cannot be read: {error}", remedy) from error
    elif layout.container == "json":
        for number, size, record in read_values(text_of(path, layout)):
            yield Item(number, 1, size, record)
    elif layout.container in ("csv", "tsv"):
        delimiter = "\t" if layout.container == "tsv" else ","
        for number, size, record in read_table(text_of(path, layout), delimiter):
            yield Item(number, 1, size, record)
    else:
        yield from _lines_to_items(lines_of(text_of(path, layout)))


def _lines_to_items(lines: Iterator[bytes | Fault] | Iterator[bytes]) -> Iterator[Item]:
    for number, line in enumerate(lines, 1):
        if isinstance(line, Fault):
            yield Item(number, 1, 0, line)
            continue
        if line.startswith(codecs.BOM_UTF8):
            line = line[3:]
        if not line or line.isspace():
            yield Item(number, 1, len(line), BLANK)
            continue
        value = parse_json(line)
        if isinstance(value, Fault) and value.reason != TOO_MUCH_MEMORY:
            value = several(line) or value
        if type(value) is dict and _WRAPPERS.isdisjoint(value):  # by far the most frequent
            yield Item(number, 1, len(line), value)
            continue
        size = len(line)
        for record in [value] if isinstance(value, Fault) else records_in(value) or [Fault(EMPTY, "an empty list")]:
            yield Item(number, 1, size, record)
            size = 0


def _batches(path: str, container: str) -> Iterator[Any]:
    """The record batches of a Parquet or Arrow file."""
    if container == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, memory_map=True) as file:
            yield from file.iter_batches(batch_size=_rows_at_once(path, file.metadata))
        return
    with pa.memory_map(path) as source:
        if container == "arrow":
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(source)


def _rows_at_once(path: str, metadata: Any) -> int:
    """Rows of a Parquet file that are held at a time: fewer where they are long. A row group may have all of them. What
    is in a dictionary stands in the file once, and in memory for each row that has it."""
    longest = 1
    with open(path, "rb") as file:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            rows = max(1, group.num_rows)
            columns = map(group.column, range(group.num_columns))
            repeated = sum(-(-column.num_values // rows) * _dictionary_bytes(file, column) for column in columns)
            longest = max(longest, group.total_byte_size // rows, repeated)
    return max(1, min(ROWS_AT_ONCE, LONGEST_LINE // longest))


def _dictionary_bytes(file: BinaryIO, column: Any) -> int:
    """Bytes of a column chunk's dictionary, all of which may be one text; 0 where it has none, or none of texts."""
    if column.physical_type not in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
        return 0
    file.seek(column.dictionary_page_offset or column.data_page_offset)  # some writers name only the latter, for both
    page = _PAGE.match(file.read(16))
    if page is None:
        return int(column.total_uncompressed_size)
    return sum((byte & 0x7F) << 7 * at for at, byte in enumerate(page["bytes"])) >> 1 if page["kind"] == b"\4" else 0


def _checked(path: str, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of a table in which a name stands for one column, and in its objects for one field."""
    for number, batch in enumerate(batches):
        twice = _repeated_name(batch.schema) if not number else None
        if twice is not None:
            raise UserError(f"{path} has two columns, or fields of one object, called `{twice}`", "Rename one of them.")
        yield batch


def _repeated_name(fields: Iterable[pa.Field]) -> str | None:
    names = set[str]()
    for field in fields:
        if field.name in names:
            return str(field.name)
        names.add(field.name)
        inner = _repeated_name(_fields_of(field.type))
        if inner is not None:
            return inner
    return None


def _fields_of(kind: pa.DataType) -> list[pa.Field]:
    """The fields of an object or of a list's objects; none of what has no names."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return [kind[i] for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def _rows(batches: Any) -> Iterator[Item]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # of a damaged one, values lie outside the file: reading them would end the process
        sparse = [
            name for name, kind in zip(batch.schema.names, batch.schema.types, strict=True) if _has_calls(name, kind)
        ]
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            part = batch.slice(start, ROWS_AT_ONCE)
            size = part.nbytes // max(1, part.num_rows)
            for record in part.to_pylist():
                number += 1
                for name in sparse:
                    record[name] = _without_nulls(record[name])
                yield Item(number, 1, size, record)


def _has_calls(name: str, kind: pa.DataType) -> bool:
    """Whether a column holds objects whose keys differ from row to row: tools, or the arguments of calls. Arrow gives
    each of them the keys of all, with null where the row had none."""
    fields = _fields_of(kind)
    return bool(fields) and (name in _SPARSE or any(_has_calls(field.name, field.type) for field in fields))


def _without_nulls(value: Any) -> Any:
    """Objects without the keys that are null."""
    if type(value) is dict:
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(part) for part in value] if type(value) is list else value


def _trees(items: Iterator[Item]) -> Iterator[Item]:
    """Single messages -> trees. An item counts the rows of its tree; a row left over is a fault of its own."""
    rows = []
    for item in items:
        if is_flat_oasst(item.record):
            rows.append({**item.record, "_number": item.number, "_size": item.size})
        else:
            yield item
    trees, left = trees_of(rows)
    for tree in trees:
        numbers, size, stack = 0, 0, [tree["prompt"]]
        while stack:
            node = stack.pop()
            numbers, size = numbers + 1, size + node["_size"]
            stack.extend(node["replies"])
        yield Item(tree["prompt"]["_number"], numbers, size, tree)
    for number, reason in left:
        yield Item(number, 1, 0, Fault(reason, "a reply whose tree cannot be found", 1))
