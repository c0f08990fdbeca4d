"""Files -> numbered records: JSON lines, JSON arrays, Parquet and Arrow; plain, gzip or zstd; streamed.

What a file holds is told by its first bytes, not by its name. Plain JSON lines are read by byte ranges, so that several
workers share a file; everything else is read from its start by one.

An item's number is its line (JSON lines), element (JSON arrays) or row (Parquet, Arrow), from 1.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lumina.data.oasst import trees_of
from lumina.data.records import BLANK, Fault, is_flat_oasst, parse_json

TRUNCATED_ARRAY = "truncated array"
TRUNCATED_FILE = "truncated file"
READ_BYTES = 1 << 20
MAX_ELEMENT_CHARS = 1 << 26  # an array element that does not end within this is broken, not long
ROWS_AT_ONCE = 512
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet", b"ARROW1": "arrow"}


class Item(NamedTuple):
    """A record: `number` says where it begins, `lines` how many of the file's records it takes up, `size` its bytes
    (an estimate for records that were never text)."""

    number: int
    lines: int
    size: int
    record: Any


class Layout(NamedTuple):
    """How a file is read: container jsonl, array, parquet or arrow; compression none, gzip or zstd; `flat` when its
    records are single OASST messages, to be put together to trees."""

    container: str
    compression: str
    flat: bool

    @property
    def splittable(self) -> bool:
        return self.container == "jsonl" and self.compression == "none" and not self.flat

    def describe(self) -> str:
        names = {"jsonl": "JSON lines", "array": "JSON array", "parquet": "Parquet", "arrow": "Arrow"}
        packed = "" if self.compression == "none" else f", {self.compression}"
        return names[self.container] + packed + (", flat OASST messages" if self.flat else "")


def expand(paths: Sequence[str]) -> list[str]:
    """Patterns -> the files they match, sorted; a path without wildcards, or that exists, stays as it is."""
    found: list[str] = []
    for path in paths:
        matches = [] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
        found += matches or [path]
    return found


def detect(path: str) -> Layout:
    """Looks at a file's first bytes and first record."""
    with open(path, "rb") as file:
        head = file.read(6)
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "none")
    if kind in ("parquet", "arrow"):
        layout = Layout(kind, "none", False)
    else:
        with closing(_stream(path, kind)) as chunks:
            first = b""
            for chunk in chunks:
                if isinstance(chunk, bytes) and (first := chunk.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]):
                    break
        layout = Layout("array" if first == b"[" else "jsonl", kind, False)
    with closing(_records(path, layout)) as items:
        sample = [item.record for item, _ in zip(items, range(20), strict=False)]
    return layout._replace(flat=any(is_flat_oasst(record) for record in sample))


def read_items(path: str, layout: Layout, start: int = 0, stop: int | None = None) -> Iterator[Item]:
    """The file's records; of a splittable file those whose line begins in bytes [start, stop).

    A blank line is the record BLANK. A record that is no JSON is a Fault.
    """
    if layout.flat:
        yield from _trees(_records(path, layout))
    elif layout.splittable and stop is not None:
        yield from _lines_to_items(read_lines(path, start, stop))
    else:
        yield from _records(path, layout)


def count_bytes(path: str, layout: Layout) -> int:
    """How many bytes a file of text holds, unpacked."""
    if layout.compression == "none":
        return Path(path).stat().st_size
    with closing(_stream(path, layout.compression)) as chunks:
        return sum(len(chunk) for chunk in chunks if isinstance(chunk, bytes))


def read_lines(path: str, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in bytes [start, stop) of the file, with their ends. Splits at LF only."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the line that byte start - 1 belongs to began before this range
        position = file.tell()
        for line in file:
            if position >= stop:
                return
            position += len(line)
            yield line


def _records(path: str, layout: Layout) -> Generator[Item, None, None]:
    if layout.container == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, memory_map=True) as file:
            yield from _rows(file.iter_batches(batch_size=ROWS_AT_ONCE))
    elif layout.container == "arrow":
        with pa.memory_map(path) as source:
            reader = pa.ipc.open_file(source)
            yield from _rows(reader.get_batch(i) for i in range(reader.num_record_batches))
    elif layout.container == "array":
        yield from _elements(_stream(path, layout.compression))
    else:
        yield from _lines_to_items(_lines(_stream(path, layout.compression)))


def _stream(path: str, compression: str) -> Generator[bytes | Fault, None, None]:
    """The unpacked bytes in chunks. A compressed file that ends or breaks early yields what it holds, then a Fault."""
    if compression == "zstd":
        with pa.input_stream(path, compression="zstd") as stream:
            yield from _chunks(stream.read)
    else:
        # read1, not read: before a break, read would throw away what it has already unpacked.
        with gzip.open(path) if compression == "gzip" else open(path, "rb") as file:
            yield from _chunks(file.read1)


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes | Fault]:
    while True:
        try:
            chunk = read(READ_BYTES)
        except (EOFError, zlib.error, OSError) as error:
            yield Fault(TRUNCATED_FILE, str(error))
            return
        if not chunk:
            return
        yield chunk


def _lines(chunks: Iterator[bytes | Fault]) -> Iterator[bytes | Fault]:
    held: list[bytes] = []
    for chunk in chunks:
        if isinstance(chunk, Fault):
            yield chunk
            return  # what is held is the beginning of a line that never ended: part of the break
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            held.append(piece)
            yield b"".join(held) + b"\n"
            held.clear()
        if rest:
            held.append(rest)
    if held:
        yield b"".join(held)


def _lines_to_items(lines: Iterator[bytes | Fault] | Iterator[bytes]) -> Iterator[Item]:
    for number, line in enumerate(lines, 1):
        if isinstance(line, Fault):
            yield Item(number, 1, 0, line)
            continue
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[3:]
        if not line or line.isspace():
            yield Item(number, 1, len(line), BLANK)
        else:
            yield Item(number, 1, len(line), parse_json(line))


def _rows(batches: Any) -> Iterator[Item]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            part = batch.slice(start, ROWS_AT_ONCE)
            size = part.nbytes // max(1, part.num_rows)
            for record in part.to_pylist():
                number += 1
                yield Item(number, 1, size, record)


def _elements(chunks: Iterator[bytes | Fault]) -> Iterator[Item]:
    """The elements of one JSON array. Where it breaks, one Fault says so, and reading ends.

    Python's scanner finds each element's end; the strict parser then reads it, as it reads a line.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    scan = json.JSONDecoder().raw_decode
    text, position, number, ended, opened, wanted = "", 0, 0, False, False, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position < len(text) and not opened:
            opened, position = True, position + 1  # the "[" that detect saw
            continue
        if position < len(text) and text[position] == "]":
            return
        try:
            if len(text) - position < wanted and not ended:
                raise IndexError
            _, end = scan(text, position)
            if end == len(text) and not ended:
                raise IndexError  # a number may go on
        except (json.JSONDecodeError, IndexError, RecursionError) as error:
            if ended or isinstance(error, RecursionError) or len(text) - position > MAX_ELEMENT_CHARS:
                yield Item(number + 1, 1, 0, Fault(TRUNCATED_ARRAY, f"after element {number}: {error}"))
                return
            chunk = next(chunks, None)
            ended = not isinstance(chunk, bytes)
            more = decoder.decode(chunk if isinstance(chunk, bytes) else b"", ended)
            if isinstance(error, json.JSONDecodeError):
                wanted = 2 * (len(text) - position)  # so that a long element is scanned a few times, not every MiB
            text, position = text[position:] + more, 0
            continue
        number, wanted = number + 1, 0
        element = text[position:end].encode("utf-8", "surrogateescape")
        position = end
        yield Item(number, 1, len(element), parse_json(element))


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
