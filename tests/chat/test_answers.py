"""Reading an answer back: what was rendered comes out of its tokens, one at a time, and what is broken is not lost."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.chat import AnswerDelta, Conversation, Message, Tokenizer, ToolCall, render
from lumina.chat.tool_calls import call_text
from tests.chat.drawn import answers, conversations, texts

TOKENIZER = Tokenizer.load("im-roles-2")
ID = TOKENIZER.special_ids


def read(ids: list[int], prompt: list[int] | None = None) -> tuple[Message, list[AnswerDelta]]:
    reader = TOKENIZER.answer_reader(prompt or [])
    deltas = [*map(reader.push, ids), reader.end()]
    reasoning, content = ("".join(getattr(delta, name) for delta in deltas) for name in ("reasoning", "content"))
    calls = tuple(call for delta in deltas for call in delta.tool_calls)
    return Message("assistant", content, reasoning=reasoning, tool_calls=calls), deltas


@given(conversations, answers(), st.booleans())
def test_a_rendered_message_is_read_back(conversation: Conversation, answer: Message, thinking: bool) -> None:
    if thinking and not answer.reasoning:
        answer = answer._replace(reasoning="why")
    prompt = TOKENIZER.prompt_ids(conversation, thinking=thinking)
    full = render(TOKENIZER, Conversation([*conversation.messages, answer], tools=conversation.tools)).ids.tolist()
    said = tuple(call._replace(id="") for call in answer.tool_calls)
    expected = Message("assistant", answer.content, reasoning=answer.reasoning, tool_calls=said)
    assert read(full[len(prompt) : -1], prompt)[0] == expected
    assert read(full[len(prompt) :], prompt)[0] == expected, "the stop token says nothing"


def test_calls_come_when_they_are_complete_and_text_as_it_arrives() -> None:
    call = TOKENIZER.encode('{"name": "add", "arguments": {"a": 1}}')
    ids = [ID["<|reasoning|>"], *TOKENIZER.encode("é!"), ID["<|reasoning_end|>"], ID["<|tool_call|>"], *call]
    message, deltas = read([*ids, ID["<|tool_call_end|>"]])
    assert message == Message("assistant", "", reasoning="é!", tool_calls=(ToolCall("add", '{"a": 1}'),))
    assert [bool(delta.tool_calls) for delta in deltas] == [False] * len(ids) + [True, False]
    assert deltas[1].reasoning, "no text is held back but half a character"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name":"add","arguments":{"a":1}}', ToolCall("add", '{"a": 1}')),
        ('\n{"arguments": {"a": "é"}, "name": "add"}\n', ToolCall("add", '{"a": "é"}')),
        ('{"name": "add", "arguments": "{\\"a\\":1}"}', ToolCall("add", '{"a":1}')),
        ('{"name": "add", "arguments": {"a": 1}, "id": 7}', ToolCall("add", '{"a": 1}')),
        ('{"name": "add", "arguments": {"a": 1}', None),
        ('{"name": "add", "arguments": [1]}', None),
        ('{"name": "add"}', None),
        ('{"name": "", "arguments": {}}', None),
        ('{"name": 3, "arguments": {}}', None),
        ('{"name": "add", "arguments": {"a": NaN}}', None),
        ("[" * 2000 + "]" * 2000, None),
        ("add(1, 2)", None),
    ],
)
def test_calls_in_other_spellings_are_read_and_broken_ones_are_content(text: str, expected: ToolCall | None) -> None:
    before, after = TOKENIZER.encode("So: "), TOKENIZER.encode(" done")
    ids = [*before, ID["<|tool_call|>"], *TOKENIZER.encode(text), ID["<|tool_call_end|>"], *after]
    content = "So:  done" if expected else f"So: {text} done"
    assert read(ids)[0] == Message("assistant", content, tool_calls=(expected,) if expected else ())


_CALL = '{"name": "f", "arguments": {}}'


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["<|tool_call|>", _CALL], Message("assistant", _CALL)),
        (["<|tool_call|>", _CALL, "<|reasoning_end|>", "x"], Message("assistant", _CALL + "x")),
        (["<|tool_call|>", _CALL, "<|reasoning|>", "x"], Message("assistant", _CALL, reasoning="x")),
        (
            ["<|tool_call|>", _CALL, "<|tool_call|>", _CALL, "<|tool_call_end|>"],
            Message("assistant", _CALL, tool_calls=(ToolCall("f", "{}"),)),
        ),
        (["<|reasoning|>", "a", "<|tool_call_end|>", "b"], Message("assistant", "", reasoning="ab")),
        (["<|reasoning|>", "a", "<|tool_call|>", "b"], Message("assistant", "b", reasoning="a")),
        (["a", "<|reasoning_end|>", "b", "<|tool_call_end|>", "c"], Message("assistant", "abc")),
    ],
)
def test_what_breaks_the_form(said: list[str], expected: Message) -> None:
    """A call without an end is content though it parses, and an end of another part ends nothing."""
    assert read([token for one in said for token in ([ID[one]] if one in ID else TOKENIZER.encode(one))])[0] == expected


_PARTS = [ID[name] for name in ("<|reasoning|>", "<|reasoning_end|>", "<|tool_call|>", "<|tool_call_end|>")]


@settings(max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(_PARTS), texts), max_size=12), st.booleans())
def test_nothing_that_the_model_says_is_lost(said: list[int | str], begun: bool) -> None:
    """Special tokens and texts in any order: every text comes out once, in order, whichever part it is counted to."""
    ids = [token for one in said for token in (TOKENIZER.encode(one) if isinstance(one, str) else [one])]
    message, deltas = read(ids, [ID["<|reasoning|>"]] if begun else None)
    calls = {delta: json.loads(call_text(delta.tool_calls[0])) for delta in deltas if delta.tool_calls}
    given_out = "".join(delta.reasoning + delta.content for delta in deltas if delta not in calls)
    assert given_out == "".join(one for one in said if isinstance(one, str)) or message.tool_calls
    assert all(call == {"name": "f", "arguments": {}} for call in calls.values()), "the one that is among the texts"


def test_half_a_character_at_the_end_of_a_part_is_not_lost() -> None:
    half = TOKENIZER.encode("🙂")[:1]
    expected = Message("assistant", "\ufffd", reasoning="\ufffd")
    assert read([ID["<|reasoning|>"], *half, ID["<|reasoning_end|>"], *half])[0] == expected


def test_json_pieces_in_random_order_are_calls_or_content() -> None:
    rng = random.Random(3)
    pieces = ['{"name": ', '"f"', ', "arguments": ', "{}", "}", '{"a": 1}', ", ", "x"]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
        message, _deltas = read([ID["<|tool_call|>"], *TOKENIZER.encode(text), ID["<|tool_call_end|>"]])
        if message.tool_calls:
            assert message.content == ""
            found, call = json.loads(text), message.tool_calls[0]
            assert (call.name, json.loads(call.arguments)) == (found["name"], found["arguments"])
        else:
            assert message.content == text


def test_the_first_template_reads_content_alone() -> None:
    first = Tokenizer.load("im-roles-1")
    reader = first.answer_reader(first.prompt_ids(Conversation([Message("user", "q")])))
    assert [reader.push(token) for token in first.encode("a b")] == [AnswerDelta(content=t) for t in ("a", " b")]
