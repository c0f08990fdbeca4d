"""Data formats, one a file: a record -> a conversation, or a fault that says why not.

Adding one is adding a file here, or in another package a module that the entry point group `lumina.formats` names, with
one `FORMAT`:

    FORMAT = DataFormat("dialogue acts", convert, recognise=((15, has("acts")),), required=has("acts"))
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from lumina.chat import Conversation
from lumina.config import FORMATS, UserError
from lumina.data.formats._format import DataFormat, Test, has
from lumina.data.records.containers import container_remedy
from lumina.data.records.fault import OTHER_FORMAT, UNKNOWN_FORMAT, WRONG_TYPE, Fault, Tree, kind
from lumina.data.records.fields import FieldTally, Vocabulary
from lumina.data.records.turns import to_conversation, to_messages

__all__ = [
    "DataFormat",
    "Fault",
    "FieldTally",
    "Tree",
    "Vocabulary",
    "added_versions",
    "convert",
    "format_of",
    "has",
    "named",
    "tests_by_precedence",
    "to_conversation",
    "to_messages",
]

# A table's columns are often called A, B, C, or in another language.
NAME_COLUMNS = "say what stands where: --columns prompt=ITS_NAME,response=ITS_NAME"


@cache
def tests_by_precedence() -> tuple[tuple[Test, DataFormat], ...]:
    """Every format's tests in the order in which they are tried: by precedence, then by the formats' names. UserError
    where another package's format does not load."""
    formats = [named(name) for name in FORMATS.names()]
    tests = [(precedence, test, entry) for entry in formats for precedence, test in entry.recognise]
    return tuple((test, entry) for _, test, entry in sorted(tests, key=lambda item: item[0]))


@cache
def named(name: str) -> DataFormat:
    """The format called `name`. ValueError where there is none, UserError where another package's does not load."""
    found = FORMATS.get(name)
    if not isinstance(found, DataFormat):
        raise UserError(f"the data format {name} is no DataFormat, but {type(found).__name__}", "Mend its package.")
    return found if name in FORMATS.own() else _guarded(found)


def _guarded(entry: DataFormat) -> DataFormat:
    """Another package's format: what it raises ends the command with the format's name."""

    def convert_guarded(record: dict[str, Any], tally: FieldTally) -> Conversation | Fault | Tree:
        try:
            return entry.convert(record, tally)
        except RecursionError:
            raise
        except Exception as error:
            raise UserError(
                f"the data format {entry.name} failed on record {tally.line}: {type(error).__name__}: {error}",
                "A record that cannot be used is to be returned as a Fault.",
            ) from error

    return replace(entry, convert=convert_guarded)


def added_versions() -> list[list[str]]:
    """[name, where, version] of the formats of other packages: with other ones, the same files are other data."""
    return [
        [name, point.value, "" if point.dist is None else point.dist.version] for name, point in FORMATS.added().items()
    ]


def format_of(record: Any) -> str | None:
    """The name of a record's format, None when it has none of ours."""
    if type(record) is not dict:
        return None
    return next((entry.name for test, entry in tests_by_precedence() if test(record)), None)


def convert(record: Any, given: str = "", tally: FieldTally | None = None) -> Conversation | Fault | Tree:
    """A parsed record -> a conversation (a tree: several), by the keys it has, or as the format `given`, a name of
    FORMATS. Its fields are counted in `tally`."""
    tally = FieldTally() if tally is None else tally
    try:
        found = _convert(record, given, tally)
    except RecursionError:
        return Fault(WRONG_TYPE, "nested too deep")
    if type(found) is Fault and type(record) is dict and found.reason in (UNKNOWN_FORMAT, WRONG_TYPE):
        remedy = container_remedy(record)
        return found if remedy is None else Fault(found.reason, remedy, found.messages)
    return found


def _convert(record: Any, given: str, tally: FieldTally) -> Conversation | Fault | Tree:
    if type(record) is dict:
        tally.format_given = bool(given)
        if tally.tools:
            tally.tools.clear()
        if given:
            entry = named(given)
            if not entry.required(record):
                return Fault(OTHER_FORMAT, f"not the format given, {given}")
            return entry.convert(record, tally)
        for test, entry in tests_by_precedence():
            if test(record):
                return entry.convert(record, tally)
        if record.get("chosen") is not None and record.get("rejected") is not None:
            return Fault(UNKNOWN_FORMAT, "a preference pair: --objective dpo trains on those", 2)
        keys = ", ".join(sorted(map(str, record))[:6])
        return Fault(UNKNOWN_FORMAT, f"none of our formats has the keys it has ({keys[:120]}); {NAME_COLUMNS}")
    if type(record) is Fault:
        return record
    return Fault(WRONG_TYPE, f"the record is {kind(record)}, not an object")
