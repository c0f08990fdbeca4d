"""File layout detection from a file's first bytes and records; only CSV and TSV go by their names."""

from __future__ import annotations

import codecs
import json
from contextlib import closing
from pathlib import Path

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
HEAD_BYTES = 1 << 16  # looked at to tell how a file is laid out


def detect(path: str) -> FileLayout:
    """Looks at a file's first bytes and first records."""
    with open(path, "rb") as file:
        head = file.read(6)
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
    return found if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start[:4] else "utf-8"


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
