"""Files -> unpacked bytes and lines, with what breaks as a Fault at its place; byte ranges of plain files."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from lumina.data.records.fault import Fault

TRUNCATED_FILE = "truncated file"
READ_BYTES = 1 << 20


class FileLayout(NamedTuple):
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


def open_stream(path: str, compression: str) -> Generator[bytes | Fault, None, None]:
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


def text_of(path: str, layout: FileLayout) -> Iterator[bytes | Fault]:
    """A text's bytes in chunks, as UTF-8."""
    chunks = open_stream(path, layout.compression)
    if layout.encoding == "utf-8":
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(layout.encoding)("replace")
    for chunk in chunks:
        yield chunk if isinstance(chunk, Fault) else decoder.decode(chunk).encode("utf-8", "replace")
    yield decoder.decode(b"", True).encode("utf-8", "replace")


def lines_of(chunks: Iterator[bytes | Fault]) -> Iterator[bytes | Fault]:
    held: list[bytes] = []
    for chunk in chunks:
        if isinstance(chunk, Fault):
            yield chunk
            return  # what is held is the beginning of a line that never ended: part of the break
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            held.append(line)
            yield b"".join(held) + b"\n"
            held.clear()
        if rest:
            held.append(rest)
    if held:
        yield b"".join(held)


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


def count_bytes(path: str, layout: FileLayout) -> int:
    """How many bytes a file of text holds, unpacked."""
    if layout.compression == "none":
        return Path(path).stat().st_size
    with closing(open_stream(path, layout.compression)) as chunks:
        return sum(len(chunk) for chunk in chunks if isinstance(chunk, bytes))
