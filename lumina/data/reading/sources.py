"""Files -> numbered records: JSON in lines, arrays and any other layout, CSV and TSV, Parquet, Arrow; plain, gzip or
zstd; UTF-8, 16 or 32; streamed.

What a file holds is told by its first bytes; only CSV and TSV go by their names. Plain JSON lines are read by byte
ranges, so that several workers share a file; everything else is read from its start by one.

An item's number is its line (JSON lines), record (other JSON) or row (CSV, Parquet, Arrow), from 1.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from lumina.config.errors import UserError
from lumina.data.formats import BLANK, Fault, is_flat_oasst, parse_json
from lumina.data.formats._fault import EMPTY, WRONG_TYPE
from lumina.data.oasst.extraction import trees_of
from lumina.data.reading.json_values import WRAPPED, WRAPPERS, read_values, records_in, several

TRUNCATED_FILE = "truncated file"
BROKEN_TABLE = "broken CSV"
READ_BYTES = 1 << 20
HEAD_BYTES = 1 << 16  # looked at to tell how a file is laid out
ROWS_AT_ONCE = 512
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow stream",
}
_WRAPPERS = frozenset(WRAPPERS)


class Item(NamedTuple):
    """A record: `number` says where it begins, `lines` how many of the file's records it takes up, `size` its bytes
    (an estimate for records that were never text)."""

    number: int
    lines: int
    size: int
    record: Any


class Layout(NamedTuple):
    """How a file is read: container jsonl, json, csv, tsv, parquet, arrow or arrow stream; compression none, gzip or
    zstd; `flat` when its records are single OASST messages, to be put together to trees; encoding of a text."""

    container: str
    compression: str
    flat: bool
    encoding: str = "utf-8"

    @property
    def splittable(self) -> bool:
        return self.container == "jsonl" and self.compression == "none" and not self.flat and self.encoding == "utf-8"

    def describe(self) -> str:
        names = {"jsonl": "JSON lines", "json": "JSON", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet"}
        packed = "" if self.compression == "none" else f", {self.compression}"
        coded = "" if self.encoding == "utf-8" else f", {self.encoding.upper()}"
        return names.get(self.container, "Arrow") + packed + coded + (", flat OASST messages" if self.flat else "")


def expand(paths: Sequence[str]) -> list[str]:
    """Patterns -> the files they match, sorted; a path without wildcards, or that exists, stays as it is. A folder that
    `datasets` saved is its Arrow files."""
    found: list[str] = []
    for path in paths:
        matches = [] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
        for match in matches or [path]:
            found += _saved_dataset(Path(match)) or [match]
    return found


def _saved_dataset(folder: Path) -> list[str]:
    """The files of `Dataset.save_to_disk(folder)`, none when it is none. UserError for one of several splits."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            which = " or ".join(str(folder / split) for split in splits)
            raise UserError(f"{folder} holds the splits {', '.join(splits)}", f"Name one: {which}.")
        if (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [str(folder / file["filename"]) for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError, OSError):
        return []  # what it is instead, check_inputs says
    return []


def detect(path: str) -> Layout:
    """Looks at a file's first bytes and first records."""
    with open(path, "rb") as file:
        head = file.read(6)
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "none")
    tables = ("parquet", "arrow", "arrow stream")
    layout = Layout(kind, "none", False) if kind in tables else _text_layout(path, kind)
    with closing(_records(path, layout)) as items:
        sample = [item.record for item, _ in zip(items, range(20), strict=False)]
    return layout._replace(flat=any(is_flat_oasst(record) for record in sample))


def _text_layout(path: str, compression: str) -> Layout:
    """How a text is laid out, from its beginning."""
    with closing(_stream(path, compression)) as chunks:
        start, whole = b"", True
        for chunk in chunks:
            start += chunk if isinstance(chunk, bytes) else b""
            if len(start) >= HEAD_BYTES:
                whole = False
                break
    encoding = _encoding(start)
    if encoding != "utf-8":
        start = start.decode(encoding, "ignore").encode()
    start = start.removeprefix(codecs.BOM_UTF8)
    name = Path(path).with_suffix("") if Path(path).suffix in (".gz", ".zst", ".zstd") else Path(path)
    if name.suffix.lower() in (".csv", ".tsv") and start.lstrip()[:1] not in (b"{", b"["):
        return Layout(name.suffix.lower()[1:], compression, False, encoding)
    return Layout("jsonl" if _are_lines(start, whole) else "json", compression, False, encoding)


def _encoding(start: bytes) -> str:
    """UTF-8, or what a byte order mark or the zeros of ASCII characters in wider units say (RFC 4627, section 3)."""
    found = json.detect_encoding(start[:4])
    if not found.startswith(("utf-16", "utf-32")):
        return "utf-8"
    return found if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start[:4] else "utf-8"


def _are_lines(start: bytes, whole: bool) -> bool:
    """Whether a text's lines are each a value of their own; `whole`: there is no more of it."""
    lines = start.split(b"\n")
    if not whole:
        lines.pop()  # cut
    full = [line for line in lines if line and not line.isspace()]
    if not full:
        # One line longer than what was looked at: an array, or what wraps one, is read piece by piece.
        return not start.lstrip().startswith(b"[") and not WRAPPED.match(start.lstrip().decode("utf-8", "replace"))
    sound = [not isinstance(parse_json(line), Fault) for line in full]
    if any(map(_opens, full, [*full[1:], b" "], sound)):
        return False
    return not full[0].lstrip().startswith(b"[") or (len(full) > 1 and all(sound[:2]))


def _opens(line: bytes, following: bytes, sound: bool) -> bool:
    """Whether a line begins a value that goes on in the next one, as a pretty-printed object or array does."""
    line = line.strip()
    begins = line.startswith((b"{", b"[")) and line.endswith((b"{", b"[", b",", b":"))
    if WRAPPED.fullmatch(line.decode("utf-8", "replace")) or line == b"[":
        return not sound  # records may follow at the margin
    return begins and not sound and following.startswith((b" ", b"\t", b'"', b"]", b"}"))


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
    elif layout.container == "arrow stream":
        with pa.memory_map(path) as source:
            yield from _rows(pa.ipc.open_stream(source))
    elif layout.container == "json":
        for number, size, record in read_values(_text(path, layout)):
            yield Item(number, 1, size, record)
    elif layout.container in ("csv", "tsv"):
        yield from _table(_text(path, layout), "\t" if layout.container == "tsv" else ",")
    else:
        yield from _lines_to_items(_lines(_text(path, layout)))


def _text(path: str, layout: Layout) -> Iterator[bytes | Fault]:
    """A text's bytes in chunks, as UTF-8."""
    chunks = _stream(path, layout.compression)
    if layout.encoding == "utf-8":
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(layout.encoding)("replace")
    for chunk in chunks:
        yield chunk if isinstance(chunk, Fault) else decoder.decode(chunk).encode("utf-8", "replace")
    yield decoder.decode(b"", True).encode("utf-8", "replace")


def _table(chunks: Iterator[bytes | Fault], delimiter: str) -> Iterator[Item]:
    """Rows as records by their headers. A field may be of any length; one too many is a fault."""
    csv.field_size_limit(sys.maxsize)
    broken: list[Fault] = []

    def lines() -> Iterator[str]:
        for line in _lines(chunks):
            if isinstance(line, Fault):
                broken.append(line)
            else:
                yield line.decode("utf-8-sig", "surrogateescape")

    rows = csv.DictReader(lines(), delimiter=delimiter, strict=True)
    try:
        names = rows.fieldnames or ()
    except csv.Error as error:
        yield Item(1, 1, 0, Fault(BROKEN_TABLE, f"the header: {error}; no row is read"))
        return
    if len(set(names)) < len(names):
        yield Item(1, 1, 0, Fault(BROKEN_TABLE, "two columns have one name"))
        return
    number = 0
    while True:
        number += 1
        try:
            row: dict[Any, Any] | None = next(rows, None)
        except csv.Error as error:  # where the next row begins cannot be told: half a field would be taught
            yield Item(number, 1, 0, Fault(BROKEN_TABLE, f"row {number}: {error}; no row after it is read"))
            break
        if row is None:
            break
        size = sum(len(value) for value in row.values() if isinstance(value, str))
        if None in row or None in row.values():
            yield Item(number, 1, size, Fault(WRONG_TYPE, f"row {number} has not as many fields as there are headers"))
            continue
        try:
            for value in row.values():
                value.encode()
        except UnicodeEncodeError:
            yield Item(number, 1, size, Fault(BROKEN_TABLE, f"row {number} is not UTF-8"))
        else:
            yield Item(number, 1, size, {name: value or None for name, value in row.items()})
    yield from (Item(number + i, 1, 0, fault) for i, fault in enumerate(broken))


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
        if line.startswith(codecs.BOM_UTF8):
            line = line[3:]
        if not line or line.isspace():
            yield Item(number, 1, len(line), BLANK)
            continue
        value = parse_json(line)
        if isinstance(value, Fault):
            value = several(line) or value
        if type(value) is dict and _WRAPPERS.isdisjoint(value):  # by far the most frequent
            yield Item(number, 1, len(line), value)
            continue
        size = len(line)
        for record in [value] if isinstance(value, Fault) else records_in(value) or [Fault(EMPTY, "an empty list")]:
            yield Item(number, 1, size, record)
            size = 0


def _rows(batches: Any) -> Iterator[Item]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            part = batch.slice(start, ROWS_AT_ONCE)
            size = part.nbytes // max(1, part.num_rows)
            for record in part.to_pylist():
                number += 1
                yield Item(number, 1, size, record)


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
