"""Data format interface: how its records are told from others', and the conversion to conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lumina.chat import Conversation
from lumina.data.records.fault import Fault, Tree
from lumina.data.records.fields import FieldTally

Record = dict[str, Any]
Test = Callable[[Record], bool]
Converter = Callable[[Record, FieldTally], Conversation | Fault | Tree]


@dataclass(frozen=True)
class DataFormat:
    """One data format.

    Attributes:
        name: what statistics call it.
        convert: (record, tally) -> a conversation, several (Tree), or a Fault that says why not. Every field of the
            record is to be counted in the tally (`FieldTally.count`), so that none is lost in silence. A function of
            its arguments alone: records are converted in several processes.
        recognise: (precedence, test) pairs. A record belongs to the format of the first test that it passes, over all
            formats, in ascending precedence; ours are 10 to 80. Empty: only sources that name this format have it.
        required: the test that every record of a source has to pass which names this format; the others are skipped
            and counted.
    """

    name: str
    convert: Converter
    recognise: tuple[tuple[int, Test], ...]
    required: Test


def has(*names: str) -> Test:
    """Whether a record has a value for one of these keys."""
    return lambda record: any(record.get(name) is not None for name in names)


def asks(name: str) -> Test:
    """Whether a record has a question (a text or messages) under this key; an object there is an OASST tree's root."""
    return lambda record: record.get(name) is not None and type(record[name]) is not dict
