"""Whole data sets that were taken for one record: what they are, and the command that makes records of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumina.data.records.fields import CONTENT
from lumina.data.records.flags import FLAGS, MASKS

_RECORD_KEYS = CONTENT - {*FLAGS, *MASKS}  # `train` is a split here


def container_remedy(value: Mapping[str, Any]) -> str | None:
    """What an object that is no record holds instead of one, and what to do; None where it looks like a record.

    Splits by name (`{"data": {"train": [...]}}`), a list for each column, records by their ids.
    """
    path = _splits(value)
    if path is not None:
        return f"its records stand under {path}: write them one a line, jq -c '{path}[]' FILE > records.jsonl"
    held = [name for name in value if name in _RECORD_KEYS]
    lists = [value[name] for name in held if type(value[name]) is list]
    if lists and len(lists) == len(held) and len({len(column) for column in lists}) == 1 and all(map(_column, lists)):
        return f"a list for each column ({', '.join(held)[:60]}), not a record: write one object a row and line"
    records = list(value.values())
    if records and all(type(record) is dict and _RECORD_KEYS & record.keys() for record in records):
        return f"records by their ids ({str(next(iter(value)))[:30]!r}, …): jq -c '.[]' FILE > records.jsonl"
    return None


def _splits(value: Mapping[str, Any]) -> str | None:
    """Where lists of objects stand, one key or two deep, beside others or under a key that is none of a record's."""
    for name, held in value.items():
        if name in _RECORD_KEYS:
            return None
        if type(held) is list and held and type(held[0]) is dict:
            return f".{name}"
        if type(held) is dict and not _RECORD_KEYS & held.keys():
            inner = next((key for key, part in held.items() if type(part) is list and part), None)
            if inner is not None and type(held[inner][0]) is dict:
                return f".{name}.{inner}"
    return None


def _column(values: list[Any]) -> bool:
    """Whether a list holds a value for each of several rows: texts, or lists of messages."""
    kinds = {type(value) for value in values}
    return bool(values) and kinds <= {str, list, type(None)} and kinds != {type(None)}
