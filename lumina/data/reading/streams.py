"""Files -> unpacked bytes and lines, with what breaks as a Fault at its place; byte ranges of plain files."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from lumina.data.records.fault import Fault

TRUNCATED_FILE = "truncated file"
LONG_LINE = "line too long"
READ_BYTES = 1 << 20
#: Bytes of a line, or of a table's row, that are held: a packed file of a few megabytes can hold one of gigabytes.
LONGEST_LINE = 1 << 26
# What is no character in UTF-16 or 32 becomes a lone surrogate, whose bytes no reader of UTF-8 takes: it makes its
# record a bad one, where U+FFFD would be learned.
_NO_CHARACTER = "lumina-no-character"


def _no_character(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udfff", error.end


codecs.register_error(_NO_CHARACTER, _no_character)


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
        yield from _zstd(path)
    else:
        # read1, not read: before a break, read would throw away what it has already unpacked.
        with gzip.open(path) if compression == "gzip" else open(path, "rb") as file:
            yield from _chunks(file.read1)


def _zstd(path: str) -> Iterator[bytes | Fault]:
    """A read that comes upon a break gives nothing of what is before it: then it is read again, in smaller parts."""
    done, size = 0, READ_BYTES
    while True:
        try:
            with pa.input_stream(path, compression="zstd") as stream:
                left = done
                while left and (chunk := stream.read(min(left, READ_BYTES))):
                    left -= len(chunk)
                while chunk := stream.read(size):
                    done += len(chunk)
                    yield chunk
            return
        except OSError as error:
            if size == 1:
                yield Fault(TRUNCATED_FILE, str(error))
                return
            size = max(1, size // 64)


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
    decoder = codecs.getincrementaldecoder(layout.encoding)(_NO_CHARACTER)
    for chunk in chunks:
        yield chunk if isinstance(chunk, Fault) else decoder.decode(chunk).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")


def _too_long() -> Fault:
    return Fault(LONG_LINE, f"more than {LONGEST_LINE:,} bytes without a line end")


def lines_of(chunks: Iterator[bytes | Fault]) -> Iterator[bytes | Fault]:
    """Lines with their ends. One of more than LONGEST_LINE bytes is a fault, and is not held."""
    held: list[bytes] = []
    size, long = 0, False
    for chunk in chunks:
        if isinstance(chunk, Fault):
            yield chunk
            return  # what is held is the beginning of a line that never ended: part of the break
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            if not long:
                held.append(line)
                yield b"".join(held) + b"\n"
            held.clear()
            size, long = 0, False
        if rest and not long:
            held.append(rest)
            size += len(rest)
            if size > LONGEST_LINE:
                yield _too_long()
                held.clear()
                long = True
    if held:
        yield b"".join(held)


def read_lines(path: str, start: int, stop: int) -> Iterator[bytes | Fault]:
    """The lines that begin in bytes [start, stop) of the file, with their ends. Splits at LF only."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            _skip_line(file)  # the line that byte start - 1 belongs to began before this range
        position = file.tell()
        while position < stop and (line := file.readline(LONGEST_LINE + 1)):
            if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
                _skip_line(file)
                position = file.tell()
                yield _too_long()
                continue
            position += len(line)
            yield line


def _skip_line(file: BinaryIO) -> None:
    while (part := file.readline(READ_BYTES)) and not part.endswith(b"\n"):
        pass


def count_bytes(path: str, layout: FileLayout) -> int:
    """How many bytes a file of text holds, unpacked."""
    if layout.compression == "none":
        return Path(path).stat().st_size
    with closing(open_stream(path, layout.compression)) as chunks:
        return sum(len(chunk) for chunk in chunks if isinstance(chunk, bytes))
