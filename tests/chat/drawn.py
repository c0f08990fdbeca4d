"""Drawn conversations with tools, tool calls, their results and reasoning, for hypothesis, and their other forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from lumina.chat import SPECIAL_TOKENS, Conversation, Message, ToolCall, json_text

# Texts that people type, special tokens by name among them; no lone surrogates, which no UTF-8 text holds.
characters = st.characters(exclude_categories=["Cs"])
texts = st.one_of(
    st.text(characters, max_size=20),
    st.lists(st.sampled_from([*SPECIAL_TOKENS, '{"name": "f", "arguments": {}}', "}", '"', " ", "é"]), max_size=4).map(
        "".join
    ),
)
names = st.one_of(st.sampled_from(["add", "get_weather"]), texts.filter(bool))
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False, width=32),
        texts,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=4,
)


@st.composite
def objects(draw: st.DrawFn) -> str:
    """The JSON text of an object, spaced and escaped as anybody might write it."""
    value: dict[str, Any] = draw(st.dictionaries(texts, values, max_size=3))
    comma, colon = draw(st.sampled_from([(", ", ": "), (",", ":"), (" , ", " :\n")]))
    around = draw(st.sampled_from(["", "\n", "  "]))
    written = json.dumps(value, ensure_ascii=draw(st.booleans()), separators=(comma, colon))
    return f"{around}{written}{around}"


identifiers = st.sampled_from(["", "call_1", "call_2"])
calls = st.builds(lambda name, arguments, id: ToolCall(name, arguments, id), names, objects(), identifiers)


@st.composite
def answers(draw: st.DrawFn) -> Message:
    """A message of the assistant's, with any of its parts."""
    reasoning, content = draw(texts), draw(texts)
    spans = sorted(draw(st.lists(st.integers(0, len(content)), max_size=2, unique=True)))
    masked = ((spans[0], spans[1]),) if len(spans) == 2 else ()
    return Message(
        "assistant",
        content,
        draw(st.sampled_from([True, True, False])),
        masked,
        reasoning,
        tuple(draw(st.lists(calls, max_size=3))),
    )


contexts = st.one_of(
    st.builds(lambda role, text: Message(role, text), st.sampled_from(["user", "system"]), texts),
    st.builds(
        lambda text, name, id: Message("tool", text, name=name, call_id=id),
        texts,
        st.one_of(st.just(""), names),
        identifiers,
    ),
)
tools = st.builds(
    lambda name, description: json.dumps(
        {"type": "function", "function": {"name": name, "description": description}}, ensure_ascii=False
    ),
    names,
    texts,
)
conversations = st.builds(
    lambda messages, tools: Conversation(messages, tools=tuple(tools)),
    st.lists(st.one_of(contexts, answers()), min_size=1, max_size=6),
    st.lists(tools, max_size=3),
)

_ADD, _MUL, _DIV = (ToolCall(name, "{}", id) for name, id in (("add", "1"), ("mul", "2"), ("div", "")))
RESULTS: dict[str, tuple[list[Message], list[str]]] = {
    "by name": ([Message("tool", "", name="own", call_id="1"), Message("tool", "", name="x")], ["own", "x"]),
    "by id": ([Message("tool", "", call_id="2"), Message("tool", "", call_id="1")], ["mul", "add"]),
    "in order": ([Message("tool", "")] * 4, ["add", "mul", "div", ""]),
    "an unknown id": ([Message("tool", "", call_id="1"), Message("tool", "", call_id="?")], ["add", "mul"]),
    "an id again": (
        [Message("assistant", "", tool_calls=(_DIV._replace(id="1"),)), Message("tool", "", call_id="1")],
        ["div"],
    ),
    "an earlier call": (
        [Message("assistant", "", tool_calls=(_DIV,)), Message("tool", "", call_id="2"), Message("tool", "")],
        ["mul", ""],
    ),
    "after another question": ([Message("tool", ""), Message("user", "q"), Message("tool", "")], ["add", "mul"]),
}
"""Messages that follow calls of add (id 1), mul (2) and div (no id), and the names that the results among them bear."""


def with_calls(messages: list[Message]) -> Conversation:
    """A conversation of RESULTS."""
    return Conversation([Message("assistant", "", tool_calls=(_ADD, _MUL, _DIV)), *messages])


def as_openai(message: Message, parsed: bool, thinks: str) -> dict[str, Any]:
    """A message as OpenAI's API has it; `parsed`: arguments as objects; `thinks`: the name of the reasoning's field."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        found[thinks] = message.reasoning
    if message.tool_calls:
        found["content"] = message.content or None
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments) if parsed else call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        found |= {"tool_call_id": message.call_id, **({"name": message.name} if message.name else {})}
    return found


def with_arguments_written_anew(conversation: Conversation) -> Conversation:
    """The conversation with its calls' arguments as Lumina writes them, as if they had come as objects."""
    written = lambda call: call._replace(arguments=json_text(json.loads(call.arguments)))
    messages = [
        message._replace(tool_calls=tuple(map(written, message.tool_calls))) for message in conversation.messages
    ]
    return Conversation(messages, tools=conversation.tools)


def every_text(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """The conversation with each of its texts changed: contents, reasoning, names, arguments, results and tools."""
    messages = [
        message._replace(
            content=change(message.content),
            masked=(),
            reasoning=message.reasoning and change(message.reasoning),
            tool_calls=tuple(
                call._replace(name=change(call.name), arguments=change(call.arguments)) for call in message.tool_calls
            ),
            name=message.name and change(message.name),
        )
        for message in conversation.messages
    ]
    return Conversation(messages, tools=tuple(map(change, conversation.tools)))
