"""Messages that a table holds as a text of JSON, or as a list for each of their fields."""

from __future__ import annotations

import re
from typing import Any

import orjson

from lumina.data.records.fault import BROKEN_JSON, PYTHON_LITERAL, Fault

_MESSAGES = re.compile(
    r"""\s*\[?\s*\{\s*(?P<quote>["'])(?:role|from|content|value)(?P=quote)\s*:.*\}\s*\]?\s*""", re.DOTALL
)


def decoded(value: Any) -> Any:
    """A list or an object kept as JSON in a text column, or messages kept as a list for each field; a Fault where a
    text was to be one of these; anything else as it is."""
    if type(value) is dict:
        return _rows(value)
    if type(value) is str and value.lstrip()[:1] in ("[", "{"):
        try:
            found = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            return _unreadable(value, error)
        parts = found if type(found) is list else [found]
        # A text that happens to be JSON stays one: only what is made of turns is a conversation.
        turns = all(type(part) is list or (type(part) is dict and ("role" in part or "from" in part)) for part in parts)
        return found if turns else value
    return value


def _unreadable(text: str, error: orjson.JSONDecodeError) -> str | Fault:
    """A text that is no JSON: a Fault where it is messages all the same, as a table's column has them."""
    found = _MESSAGES.fullmatch(text)
    if found is None:
        return text
    if found["quote"] == "'":
        return Fault(PYTHON_LITERAL, "messages in a text column: write them with json.dumps, not str")
    return Fault(BROKEN_JSON, f"messages in a text column: {error}")


def _rows(value: dict[str, Any]) -> Any:
    """`{"from": [...], "value": [...]}`, as `datasets` keeps a sequence of objects, as objects; any other as it is."""
    lists = [held for held in value.values() if type(held) is list]
    if len(lists) < 2 or len(lists) < len(value) or {"role", "from"}.isdisjoint(value):
        return value
    if len({len(held) for held in lists}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
