"""Tools and their calls, in the forms in which data sets have them -> lumina.chat's.

A tool is `{"type": "function", "function": {"name", "description", "parameters"}}` (OpenAI) or the inner object alone
(xLAM, Hermes; Anthropic and MCP say `input_schema`); a call `{"id", "type", "function": {"name", "arguments"}}` or
`{"name", "arguments"}`, where the arguments are an object or its JSON text. Lists of them, one alone, and the JSON text
of either are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

from lumina.chat import ToolCall
from lumina.data.records.fault import BAD_ARGUMENTS, BAD_CALL, BAD_TOOL, PYTHON_LITERAL, TWICE, Fault, kind
from lumina.data.records.fields import NOT_USED, FieldTally, Vocabulary, is_empty, one_of

TOOLS = ("tools", "functions", "available_tools")
CALLS = ("tool_calls", "tool_call", "function_call")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_RESULTS = ("result", "results", "observation", "response")
_SCHEMAS = ("input_schema", "inputSchema")
_CALL = Vocabulary("a tool call", frozenset({"type", "function", "name", *_ARGUMENTS}))
_CALL_TYPES = ("function", "tool_use", "tool_call", "function_call")
_TOOL_TYPES = ("function", "custom")


def json_text(value: Any) -> str | None:
    """The JSON text of a value as chat templates write it (`tojson`), None where it has none or is nested too deep."""
    try:
        strict = orjson.loads(orjson.dumps(value))  # NaN is null, dates are texts; refuses what is no value of JSON
    except TypeError:
        return None
    return json.dumps(strict, ensure_ascii=False)


def from_json(value: Any) -> Any:
    """What a text of JSON holds, where it is a list or an object; anything else as it is."""
    if type(value) is str and value.lstrip()[:1] in ("[", "{"):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def _no_object(value: Any, reason: str, detail: str) -> Fault:
    """The fault of a tool or call that is none, by the true reason."""
    if type(value) is str and value.lstrip("[ \n\t").startswith("{'"):
        return Fault(PYTHON_LITERAL, f"{detail}: write it with json.dumps, not str")
    return Fault(reason, detail)


def tools_of(value: Any, name: str) -> tuple[str, ...] | Fault:
    """The tools that the field `name` declares, as JSON texts in OpenAI's form. All keys of a tool are kept."""
    value = from_json(value)
    if is_empty(value):
        return ()
    found = []
    for tool in value if type(value) is list else [value]:
        whole = _tool(from_json(tool), name)
        if isinstance(whole, Fault):
            return whole
        text = json_text(whole)
        if text is None:
            return Fault(BAD_TOOL, f"`{name}` holds what JSON has no form for")
        found.append(text)
    return tuple(found)


def _tool(tool: Any, name: str) -> dict[str, Any] | Fault:
    """One tool in OpenAI's form."""
    if type(tool) is not dict:
        return _no_object(tool, BAD_TOOL, f"`{name}`: a tool is {kind(tool)}, not an object")
    if tool.get("type") is not None and tool["type"] not in _TOOL_TYPES:
        return Fault(f"{NOT_USED}: a tool of type {str(tool['type'])[:30]}", f"`{name}`: only functions are read")
    inner, around = from_json(tool.get("function")), {}
    if type(inner) is dict:
        around = {key: value for key, value in tool.items() if key != "type"}
        inner = dict(inner)
    else:
        inner = {key: value for key, value in tool.items() if key != "type"}
    schema = next((key for key in _SCHEMAS if key in inner), None)
    if schema is not None and "parameters" not in inner:
        inner = {"parameters" if key == schema else key: value for key, value in inner.items()}
    if "parameters" in inner:
        inner["parameters"] = from_json(inner["parameters"])
    called = inner.get("name")
    if type(called) is not str or not called.strip():
        return Fault(BAD_TOOL, f"`{name}`: a tool's name is {kind(called)}")
    return {"type": "function", **around, "function": inner}


def calls_of(value: Any, tally: FieldTally) -> tuple[ToolCall, ...] | Fault:
    """Tool calls in any of their forms: a list, one alone, or the JSON text of either."""
    value = from_json(value)
    if is_empty(value):
        return ()
    found = []
    for call in value if type(value) is list else [value]:
        read = _call(from_json(call), tally)
        if isinstance(read, Fault):
            return read
        found.append(read)
    return tuple(found)


def _call(call: Any, tally: FieldTally) -> ToolCall | Fault:
    if type(call) is not dict:
        return _no_object(call, BAD_CALL, f"a tool call is {kind(call)}: {str(call)[:60]!r}")
    sort = call.get("type")
    if sort is not None and sort not in _CALL_TYPES:
        return Fault(f"{NOT_USED}: a tool call of type {str(sort)[:30]}", "only calls of functions are read")
    result = next((name for name in _RESULTS if not is_empty(call.get(name))), None)
    if result is not None:
        return Fault(f"{NOT_USED}: {result}", f"`{result}` in a tool call: a result is a message of its own")
    fault = tally.count(_CALL, call)
    if fault is not None:
        return fault
    spec, inner = call, from_json(call.get("function"))
    if type(inner) is dict:
        fault = tally.count(_CALL, inner)
        if fault is not None:
            return fault
        for key in ("name", *_ARGUMENTS):
            if not is_empty(call.get(key)) and not is_empty(inner.get(key)) and call[key] != inner[key]:
                return Fault(TWICE, f"a tool call has `{key}` twice")
        spec = {**call, **{key: value for key, value in inner.items() if value is not None}}
    name = spec.get("name", inner if type(inner) is str else None)
    if type(name) is not str or not name.strip():
        return Fault(BAD_CALL, f"the name of a tool call is {kind(name)}")
    where, twice = one_of(spec, _ARGUMENTS)
    if twice:
        return Fault(TWICE, "a tool call's arguments stand in two fields that differ")
    arguments = _arguments(spec[where] if where is not None else None, name)
    if isinstance(arguments, Fault):
        return arguments
    return ToolCall(name, arguments, id_of(call, ("id", "call_id", "tool_call_id")))


def _arguments(value: Any, name: str) -> str | Fault:
    """The JSON text of a call's arguments: a text as it stands, an object as templates write it; nothing is `{}`."""
    if value is None or (type(value) is str and (not value or value.isspace())):
        return "{}"
    parsed = value
    if type(value) is str:
        try:
            parsed = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            return Fault(BAD_ARGUMENTS, f"{name[:40]}: {error}: {value[:60]!r}")
    if type(parsed) is not dict:
        return Fault(BAD_ARGUMENTS, f"{name[:40]}: they are {kind(parsed)}: {str(value)[:60]!r}")
    text = json_text(parsed)
    if text is None:
        return Fault(BAD_ARGUMENTS, f"{name[:40]}: JSON has no form for them, or they are nested too deep")
    return value.strip() if type(value) is str else text


def same_calls(one: Sequence[ToolCall], other: Sequence[ToolCall]) -> bool:
    """Whether two fields hold the same calls, however their arguments are written."""
    left, right = ([(call.name, orjson.loads(call.arguments)) for call in calls] for calls in (one, other))
    return left == right


def id_of(held: dict[str, Any], names: Sequence[str]) -> str:
    """The first id under these keys, as text."""
    return next((str(held[name]) for name in names if type(held.get(name)) in (str, int)), "")
