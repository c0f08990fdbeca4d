"""Reasoning and content in parts: fields and parts of every name, their order, and what has no place."""

from __future__ import annotations

from typing import Any

import pytest

from lumina.chat import Conversation, Message, ToolCall
from lumina.data.formats import convert
from lumina.data.records.fault import OUT_OF_ORDER, TWICE, Fault

THOUGHT = "17*3 is 51."
USER, ANSWER = Message("user", "q"), Message("assistant", "51", reasoning=THOUGHT)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def read(*turns: dict[str, Any]) -> list[Message]:
    found = convert({"messages": list(turns)})
    assert isinstance(found, Conversation), found
    return list(found.messages)


def refused(*turns: dict[str, Any]) -> str:
    found = convert({"messages": list(turns)})
    assert isinstance(found, Fault), found
    return found.reason


NAMES = [
    *("reasoning_content", "reasoning", "thinking", "thoughts", "thought", "think", "chain_of_thought", "cot"),
    *("rationale", "thinking_blocks", "reasoning_details"),
]
FORMS: list[Any] = [
    THOUGHT,
    [THOUGHT],
    {"type": "thinking", "thinking": THOUGHT, "signature": "Ab=="},
    [{"type": "thinking", "thinking": THOUGHT}],
    [{"type": "reasoning.text", "text": THOUGHT, "format": "x", "index": 0}],
    [{"type": "reasoning.text", "text": "17*3 "}, {"type": "reasoning.text", "text": "is 51."}],
    [{"type": "reasoning.summary", "summary": THOUGHT}],
    [{"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]}],
    [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}],
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_reasoning_by_every_name_and_in_every_form(name: str, form: Any) -> None:
    assert read(turn("user", "q"), turn("assistant", "51", **{name: form})) == [USER, ANSWER]
    for empty in ("", None, []):
        found = read(turn("user", "q"), turn("assistant", empty or "", **{name: form}))
        assert found == [USER, Message("assistant", "", reasoning=THOUGHT)]
        assert read(turn("user", "q"), turn("assistant", "51", **{name: empty})) == [USER, Message("assistant", "51")]


@pytest.mark.parametrize("form", FORMS[2:])
def test_reasoning_among_the_parts(form: Any) -> None:
    parts = [*(form if isinstance(form, list) else [form]), {"type": "text", "text": "51"}]
    assert read(turn("user", "q"), turn("assistant", parts)) == [USER, ANSWER]
    assert read(turn("user", "q"), turn("assistant", parts, reasoning_content=THOUGHT)) == [USER, ANSWER]


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_beside_a_question_and_its_answer(name: str) -> None:
    for record in (
        {"question": "q", "answer": "51"},
        {"instruction": "q", "output": "51"},
        {"prompt": "q", "response": "51"},
    ):
        found = convert({**record, name: THOUGHT})
        assert isinstance(found, Conversation), found
        assert list(found.messages) == [USER, ANSWER]


def test_reasoning_in_two_places() -> None:
    both = {"reasoning": THOUGHT, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]}
    assert read(turn("user", "q"), turn("assistant", "51", **both)) == [USER, ANSWER]
    assert refused(turn("user", "q"), turn("assistant", "51", **both, thinking="other")) == TWICE


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (True, "field not used: reasoning"),
        (7, "field not used: reasoning"),
        ({"steps": "x"}, "field not used: reasoning"),
        ([{"type": "reasoning.encrypted", "data": "Ab=="}], "field not used: reasoning"),
        ([{"type": "thinking", "thinking": "t", "answer": "u"}], "field not used: answer"),
    ],
)
def test_reasoning_that_is_no_text_is_refused(value: Any, reason: str) -> None:
    assert refused(turn("user", "q"), turn("assistant", "51", reasoning=value)) == reason


USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
CALL = ToolCall("f", '{"a": 1}', "c1")


def test_anthropics_parts() -> None:
    parts = [
        {"type": "thinking", "thinking": "hm", "signature": "Ab=="},
        {"type": "text", "text": "Let me look.", "cache_control": {"type": "ephemeral"}},
        USE,
        {**USE, "id": "c2"},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "one", "is_error": False},
        {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "two"}]},
        {"type": "tool_result", "tool_use_id": "c3"},
        {"type": "text", "text": "and now?"},
    ]
    found = read(turn("user", "q"), turn("assistant", parts), turn("user", results), turn("assistant", "51"))
    assert found == [
        USER,
        Message("assistant", "Let me look.", reasoning="hm", tool_calls=(CALL, CALL._replace(id="c2"))),
        Message("tool", "one", call_id="c1"),
        Message("tool", "two", call_id="c2"),
        Message("tool", "", call_id="c3"),
        Message("user", "and now?"),
        Message("assistant", "51"),
    ]
    only = read(turn("user", "q"), turn("assistant", [USE]), turn("user", results[:1]), turn("assistant", "51"))
    assert [message.role for message in only] == ["user", "assistant", "tool", "assistant"]
    first = read(turn("user", [results[3], results[0]]), turn("assistant", "51"))
    assert [(message.role, message.content) for message in first[:2]] == [("user", "and now?"), ("tool", "one")]


def test_the_same_calls_as_parts_and_as_a_field() -> None:
    """LangChain's messages have both."""
    calls = [{"name": "f", "args": {"a": 1}, "id": "c1", "type": "tool_call"}]
    assert read(turn("user", "q"), turn("assistant", [USE], tool_calls=calls))[1].tool_calls == (CALL,)
    calls[0]["args"] = {"a": 2}
    assert refused(turn("user", "q"), turn("assistant", [USE], tool_calls=calls)) == TWICE


TEXT, THINKING = {"type": "text", "text": "t"}, {"type": "thinking", "thinking": "h"}


@pytest.mark.parametrize(
    "parts", [[TEXT, THINKING], [USE, TEXT], [THINKING, TEXT, THINKING], [USE, THINKING], [USE, TEXT, USE]]
)
def test_an_order_that_no_template_has_is_refused(parts: list[Any]) -> None:
    assert refused(turn("user", "q"), turn("assistant", parts)) == OUT_OF_ORDER
    blank = [{"type": "text", "text": " "}, THINKING, TEXT, USE, {"type": "text", "text": "\n"}]
    assert read(turn("user", "q"), turn("assistant", blank))[1].tool_calls == (CALL,)


@pytest.mark.parametrize(
    ("role", "part", "reason"),
    [
        ("user", THINKING, "field not used: content of type reasoning"),
        ("user", USE, "field not used: content of type tool call"),
        ("system", THINKING, "field not used: content of type reasoning"),
        ("system", {"type": "tool_result", "content": "x"}, "field not used: content of type tool result"),
        ("assistant", {"type": "tool_result", "content": "x"}, "field not used: content of type tool result"),
        ("assistant", {"type": "redacted_thinking", "data": "x"}, "field not used: content of type redacted_thinking"),
        ("user", {"type": "image_url", "image_url": "x"}, "field not used: content of type image_url"),
        ("user", {"type": "text", "text": "t", "thinking": "h"}, "field not used: thinking"),
        ("user", {"type": "text", "text": 7}, "wrong type"),
        ("user", {"type": "text", "value": "u"}, "field not used: value"),
        ("assistant", {"toolUse": {"name": "f", "input": {}}}, "field not used: toolUse"),
        ("assistant", {"functionCall": {"name": "f", "args": {}}}, "field not used: functionCall"),
    ],
)
def test_parts_without_a_place_are_refused_by_name(role: str, part: dict[str, Any], reason: str) -> None:
    assert refused(turn(role, [TEXT, part]), turn("user", "q"), turn("assistant", "51")) == reason


def test_a_part_whose_text_is_null_says_nothing() -> None:
    """As Arrow gives parts the keys of all."""
    parts = [{"type": "text", "text": "51", "thinking": None}, {"type": "text", "text": None}]
    assert read(turn("user", "q"), turn("assistant", parts)) == [USER, Message("assistant", "51")]


def test_an_empty_last_answer_is_left_out_whatever_its_fields_are() -> None:
    assert read(turn("user", "q"), turn("assistant", "51"), turn("assistant", None)) == [
        USER,
        Message("assistant", "51"),
    ]
    assert refused(turn("user", "q"), turn("assistant", "51"), {"role": "assistant", "said": "x"}) == "wrong type"
    for empty in ({"reasoning_content": ""}, {"tool_calls": []}, {"thinking": None, "function_call": {}}):
        assert read(turn("user", "q"), turn("assistant", "51"), turn("assistant", "", **empty)) == [
            USER, Message("assistant", "51")
        ]  # fmt: skip
