"""File layout detection from a file's first bytes and records; only CSV and TSV go by their names."""

from __future__ import annotations

import codecs
import json
from contextlib import closing
from pathlib import Path

from lumina.config import UserError
from lumina.data.oasst.trees import is_flat_oasst
from lumina.data.reading.items import read_records
from lumina.data.reading.json_values import WRAPPED, parse_json
from lumina.data.reading.streams import FileLayout, open_stream
from lumina.data.records.fault import Fault

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow stream",
}
_UNPACK = "Unpack it first, or pack it with gzip or zstd, which are read as they are."
_WRITE = "Write its records as JSON lines or Parquet first."
_NOT_READ = {
    b"PK\x03\x04": ("a zip archive (or a spreadsheet)", _UNPACK),
    **{b"BZh%d1AY&SY" % level: ("packed with bzip2", _UNPACK) for level in range(1, 10)},
    b"\xfd7zXZ\0": ("packed with xz", _UNPACK),
    b"7z\xbc\xaf'\x1c": ("a 7z archive", _UNPACK),
    b"\x04\x22\x4d\x18": ("packed with LZ4", _UNPACK),
    b"SQLite format 3\0": ("an SQLite database", _WRITE),
    b"\x89HDF\r\n": ("an HDF5 file", _WRITE),
    b"\x93NUMPY": ("a NumPy file", _WRITE),
    b"Obj\x01": ("an Avro file", _WRITE),
    b"FEA1": ("a Feather file of version 1", _WRITE),
    **{
        bytes((0x80, version)): ("a pickle, which can run any code when it is opened", _WRITE)
        for version in range(2, 6)
    },
}
HEAD_BYTES = 1 << 16  # looked at to tell how a file is laid out


def detect(path: str) -> FileLayout:
    """Looks at a file's first bytes and first records. UserError: a container that is not read."""
    with open(path, "rb") as file:
        head = file.read(16)
    for magic, (what, remedy) in _NOT_READ.items():
        if head.startswith(magic):
            raise UserError(f"{path} is {what}", remedy)
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "none")
    tables = ("parquet", "arrow", "arrow stream")
    layout = FileLayout(kind, "none", False) if kind in tables else _text_layout(path, kind)
    with closing(read_records(path, layout)) as items:
        sample = [item.record for item, _ in zip(items, range(20), strict=False)]
    return layout._replace(flat=any(is_flat_oasst(record) for record in sample))


def _text_layout(path: str, compression: str) -> FileLayout:
    """How a text is laid out, from its beginning."""
    with closing(open_stream(path, compression)) as chunks:
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
        return FileLayout(name.suffix.lower()[1:], compression, False, encoding)
    return FileLayout("jsonl" if _are_lines(start, whole) else "json", compression, False, encoding)


def _encoding(start: bytes) -> str:
    """UTF-8, or what a byte order mark or the zeros of ASCII characters in wider units say (RFC 4627, section 3)."""
    found = json.detect_encoding(start[:4])
    if not found.startswith(("utf-16", "utf-32")):
        return "utf-8"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return found
    # Zeros alone may be a torn file's: in it no other character is a quote, a comma or the end of a line.
    text = start.decode(found, "ignore").lstrip("\0")
    return "utf-8" if b"\0" not in start[:4] or {'"', ",", "\t", "\n"}.isdisjoint(text) else found


def _are_lines(start: bytes, whole: bool) -> bool:
    """Whether a text's lines are each a value of their own; `whole`: there is no more of it."""
    lines = start.split(b"\n")
    if not whole:
        lines.pop()  # cut
    full = [line for line in lines if line and not line.isspace()]
    if not full:
        # One line longer than what was looked at: an array, or what wraps one, is read element by element.
        return not start.lstrip().startswith(b"[") and not WRAPPED.match(start.lstrip().decode("utf-8", "replace"))
    valid = [not isinstance(parse_json(line), Fault) for line in full]
    if any(map(_opens, full, [*full[1:], b" "], valid)):
        return False
    return not full[0].lstrip().startswith(b"[") or (len(full) > 1 and all(valid[:2]))


def _opens(line: bytes, following: bytes, valid: bool) -> bool:
    """Whether a line begins a value that goes on in the next one, as a pretty-printed object or array does."""
    line = line.strip()
    begins = line.startswith((b"{", b"[")) and line.endswith((b"{", b"[", b",", b":"))
    if WRAPPED.fullmatch(line.decode("utf-8", "replace")) or line == b"[":
        return not valid  # records may follow at the margin
    return begins and not valid and following.startswith((b" ", b"\t", b'"', b"]", b"}"))
