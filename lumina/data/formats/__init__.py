"""One record of a file -> a Conversation, or a Fault that says why not. A format is one file here and one line
below."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson

from lumina.chat.template import Conversation
from lumina.data.formats._fault import (
    BLANK,
    BROKEN_JSON,
    OTHER_FORMAT,
    PYTHON_LITERAL,
    UNKNOWN_FORMAT,
    WRONG_TYPE,
    Fault,
    Tree,
    kind,
)
from lumina.data.formats._fields import FieldTally
from lumina.data.formats._instruction import from_instruction, has_answer
from lumina.data.formats.messages import from_messages
from lumina.data.formats.oasst import from_tree, is_flat_oasst
from lumina.data.formats.sharegpt import KEYS as SHAREGPT_KEYS
from lumina.data.formats.sharegpt import from_sharegpt
from lumina.data.formats.text import from_text

__all__ = [
    "BLANK",
    "NAMED",
    "Fault",
    "FieldTally",
    "Tree",
    "convert",
    "format_of",
    "from_messages",
    "is_flat_oasst",
    "parse_json",
]

Converter = Callable[[dict[str, Any], FieldTally], "Conversation | Fault | Tree"]


def _has(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda record: any(record.get(name) is not None for name in names)


def _has_tree(record: dict[str, Any]) -> bool:
    return type(record.get("prompt")) is dict


def _asks(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda record: record.get(name) is not None and type(record[name]) is not dict


# What tells a format, its name, and its converter; the first that applies decides.
FORMATS: tuple[tuple[Callable[[dict[str, Any]], bool], str, Converter], ...] = (
    (lambda record: type(record.get("messages")) is list, "messages", from_messages),
    (_has_tree, "OASST tree", from_tree),
    (lambda record: _asks("prompt")(record) and has_answer(record), "prompt and response", from_instruction),
    (_has("messages"), "messages", from_messages),
    (_has(*SHAREGPT_KEYS), "ShareGPT", from_sharegpt),
    (_has("instruction"), "Alpaca", from_instruction),
    (lambda record: _has("question", "query")(record) and has_answer(record), "question and answer", from_instruction),
    (_has("text"), "text", from_text),
)

# What a source's `format` may say: what such a record must have, and its converter.
NAMED: dict[str, tuple[Callable[[dict[str, Any]], bool], Converter]] = {
    "messages": (_has("messages"), from_messages),
    "sharegpt": (_has(*SHAREGPT_KEYS), from_sharegpt),
    "alpaca": (_asks("instruction"), from_instruction),
    "prompt": (_asks("prompt"), from_instruction),
    "oasst": (_has_tree, from_tree),
    "text": (_has("text"), from_text),
}


def format_of(record: Any) -> str | None:
    """The name of a record's format, None when it has none of ours."""
    if type(record) is not dict:
        return None
    return next((name for applies, name, _ in FORMATS if applies(record)), None)


def convert(record: Any, given: str = "", tally: FieldTally | None = None) -> Conversation | Fault | Tree:
    """A parsed record -> a conversation (a tree: several), by the keys it has, or as the format `given` (see NAMED).
    Its fields are counted in `tally`."""
    tally = FieldTally() if tally is None else tally
    try:
        return _convert(record, given, tally)
    except RecursionError:
        return Fault(WRONG_TYPE, "nested too deep")


def _convert(record: Any, given: str, tally: FieldTally) -> Conversation | Fault | Tree:
    if type(record) is dict:
        tally.format_given = bool(given)
        if given:
            applies, converter = NAMED[given]
            if not applies(record):
                return Fault(OTHER_FORMAT, f"not the format given, {given}")
            return converter(record, tally)
        if type(record.get("messages")) is list:  # by far the most frequent
            return from_messages(record, tally)
        for applies, _, converter in FORMATS:
            if applies(record):
                return converter(record, tally)
        if record.get("chosen") is not None and record.get("rejected") is not None:
            return Fault(UNKNOWN_FORMAT, "a preference pair: --objective dpo trains on those", 2)
        keys = ", ".join(sorted(map(str, record))[:6])
        return Fault(UNKNOWN_FORMAT, f"none of our formats has the keys it has ({keys[:120]})")
    if type(record) is Fault:
        return record
    return Fault(WRONG_TYPE, f"the record is {kind(record)}, not an object")


def parse_json(line: bytes) -> Any:
    """The line's value, or a Fault. JSON, where NaN and infinities are read as null; lone surrogates and invalid UTF-8
    are faults."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if b"NaN" in line or b"Infinity" in line:
            try:  # Python's reader knows them; written and read again they are null, and a lone surrogate is an error
                return orjson.loads(orjson.dumps(json.loads(line.decode("utf-8"))))
            except (ValueError, TypeError, RecursionError):
                pass
        if line.lstrip()[:2] in (b"{'", b"['"):
            return Fault(PYTHON_LITERAL, "write lines with json.dumps, not print or str", raw=line)
        return Fault(BROKEN_JSON, str(error), raw=line)
