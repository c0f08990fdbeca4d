"""Printing text that somebody else wrote: data, names, a model's words. What could steer a terminal is shown instead.

Every command prints through `say`, or through the rich console that `console` makes; tests/architecture.py holds that
nothing else prints. This imports nothing of the package, so that every room can use it.
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

#: Control characters (C0 but for tab and line feed, DEL, C1), halves of characters, and what turns the direction of the
#: text around it (Unicode TR 9; U+200E and U+200F, which turn none, belong to Arabic and Hebrew).
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with what could steer a terminal written as Python writes it: `\\x1b`, `\\u202e`. Printing the result
    again changes nothing."""
    return _STEERING.sub(_written, text)


def _written(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def say(*values: object, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """print, of printable text."""
    out = sys.stdout if file is None else file
    out.write(printable(" ".join(map(str, values))) + end)
    if flush:
        out.flush()


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return re.sub("(....)", r"\\u\1", units), error.end


_ESCAPED = "lumina-escaped"
codecs.register_error(_ESCAPED, _escaped)


def escape_what_is_missing(stream: TextIO | None) -> None:
    """Let a stream whose encoding does not have every character (a Latin-1 locale) write the others as JSON does,
    `\\u4e2d`, where writing would fail after the work is done."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_ESCAPED)


def json_line(value: Any, *, indent: int | None = None, default: Any = None) -> str:
    """JSON for a program's standard output: what could steer a terminal is escaped within it, so that it reads the
    same."""
    return escape_json(json.dumps(value, ensure_ascii=False, indent=indent, default=default))


def escape_json(text: str) -> str:
    """A JSON text with what could steer a terminal escaped: it reads the same."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Formatter(logging.Formatter):
    """Log lines of printable text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def console(**options: Any) -> Console:
    """A rich console that shows steering characters of whatever it is given; `options` are rich's."""
    return _console_class()(**{"highlight": False, **options})


@cache
def _console_class() -> type[Console]:
    from rich.console import Console
    from rich.segment import Segment

    class Shown(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                text, style, control = segment
                yield segment if control else Segment(printable(text), style)

    return Shown
