"""Tool calls as the JSON text that the model writes: `{"name": "add", "arguments": {"a": 1, "b": 2}}`, and back.

The arguments stand there letter for letter as they were given, so that a call that was read is rendered as it was said.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from lumina.chat.conversation import ToolCall

_NAME, _ARGUMENTS = '{"name": ', ', "arguments": '


def json_text(value: Any) -> str:
    """A JSON value as text, in the one way that all of Lumina writes arguments and tools that come as objects; it is
    that of transformers' templates (`tojson`)."""
    return json.dumps(value, ensure_ascii=False)


def call_text(call: ToolCall) -> str:
    """A call as the template renders it. `read_call` reads it back where `is_readable`."""
    return f"{_NAME}{json_text(call.name)}{_ARGUMENTS}{call.arguments}}}"


def is_readable(call: ToolCall) -> bool:
    """Whether the call has a name and its arguments are the JSON text of an object."""
    return read_call(call_text(call)) == call._replace(id="")


def read_call(text: str) -> ToolCall | None:
    """The call that a text is, in any spacing and with the arguments as an object or as its JSON text; None for a text
    that is no call."""
    found = _loads(text)
    if type(found) is not dict or type(found.get("name")) is not str or not found["name"]:
        return None
    name, arguments = found["name"], found.get("arguments")
    opening = f"{_NAME}{json_text(name)}{_ARGUMENTS}"
    if text.startswith(opening) and text.endswith("}"):
        written = text[len(opening) : -1]
        if type(_loads(written)) is dict:
            return ToolCall(name, written)
    if type(arguments) is dict:
        return ToolCall(name, json_text(arguments))
    return ToolCall(name, arguments) if type(arguments) is str and type(_loads(arguments)) is dict else None


def _loads(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
