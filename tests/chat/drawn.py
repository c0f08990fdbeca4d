"""Drawn conversations with tools, tool calls, their results and reasoning, for hypothesis."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from lumina.chat import SPECIAL_TOKENS, Conversation, Message, ToolCall

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
