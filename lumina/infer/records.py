"""Conversations as records of JSON, in the form of OpenAI's API, which `lumina train` reads; tools from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from lumina.chat import ROLE_ALIASES, Conversation, Message, ToolCall, json_text
from lumina.config import UserError
from lumina.files import FormatError, read_json


def record_of(conversation: Conversation) -> dict[str, Any]:
    """{"messages": [{"role", "content", ...}], "tools"?}: each message with the fields that it has."""
    messages = []
    for message in conversation.messages:
        record: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            record["reasoning_content"] = message.reasoning
        if message.tool_calls:
            record["tool_calls"] = [_call_record(call) for call in message.tool_calls]
        if message.role == "tool":
            named = {"name": message.name, "tool_call_id": message.call_id}
            record |= {name: value for name, value in named.items() if value}
        messages.append(record)
    tools = [orjson.loads(tool) for tool in conversation.tools]
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _call_record(call: ToolCall) -> dict[str, Any]:
    record: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return {"id": call.id, **record} if call.id else record


def message_of(record: Mapping[str, Any]) -> Message:
    """A message of `record_of`'s form. Raises ValueError, KeyError, TypeError or AttributeError: it is not one."""
    role, calls = record["role"], record.get("tool_calls") or ()
    content = record["content"] if "content" in record or not calls else ""
    return Message(
        "tool" if role == "tool" else ROLE_ALIASES[role],
        "" if content is None and calls else str(content),
        reasoning=str(record.get("reasoning_content") or ""),
        tool_calls=tuple(_call_of(call) for call in calls),
        name=str(record.get("name") or "") if role == "tool" else "",
        call_id=str(record.get("tool_call_id") or ""),
    )


def _call_of(record: Mapping[str, Any]) -> ToolCall:
    function = record["function"]
    arguments = function.get("arguments") or "{}"
    text = arguments if isinstance(arguments, str) else json_text(arguments)
    return ToolCall(str(function["name"]), text, str(record.get("id") or ""))


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """A conversation of `record_of`'s form. Raises as `message_of`, and UserError: a tool that is none."""
    tools = tool_texts(record.get("tools") or ())
    return Conversation([message_of(message) for message in record["messages"]], tools=tools)


def tool_texts(tools: Any) -> tuple[str, ...]:
    """Tools as OpenAI's API has them, or their functions alone, as a Conversation has them. Raises UserError."""
    found = []
    for tool in tools if isinstance(tools, list | tuple) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                "a tool is not as OpenAI's API has it",
                '{"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}',
            )
        around = {key: value for key, value in tool.items() if key != "type"} if "function" in tool else {}
        found.append(json_text({"type": "function", **around, "function": function}))  # all keys, as training has them
    return tuple(found)


def read_tools(path: Path) -> tuple[str, ...]:
    """The tools of a JSON file: a list, or an object with the list under "tools". Raises UserError."""
    try:
        found = read_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except FormatError as error:
        raise UserError(str(error)) from None
    try:
        return tool_texts(found["tools"] if isinstance(found, dict) and "tools" in found else found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
