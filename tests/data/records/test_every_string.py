"""Law 4 for every string: a marker planted in each text of a record of any format, tools, arguments and parts included,
is supervised, is context, or stands under a field that is counted as refused, harmless or unknown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumina.chat import Conversation
from lumina.data.formats import convert
from lumina.data.preference.pair import Pair, from_pair
from lumina.data.records.calls import CALLS, TOOLS
from lumina.data.records.fault import Fault, Tree
from lumina.data.records.fields import CONTENT, HARMLESS, FieldTally
from lumina.data.records.flags import FLAGS, MASKS
from lumina.data.records.parts import REASONING
from tests.data.helpers import AGENT_TOKENIZER

# --- Records of any format ---------------------------------------------------------------------------


class AsText(NamedTuple):
    """A value that the record holds as a text of JSON."""

    value: Any


def either(value: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([value, AsText(value)])


JSON = st.recursive(
    st.sampled_from(["x", 1, True, None]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "name", "id", "content"]), inner, max_size=3)
    ),
    max_leaves=6,
)
OBJECT = st.dictionaries(st.sampled_from(["a", "name", "id", "query", "tools"]), JSON, max_size=3)
SCHEMA = OBJECT.map(
    lambda more: {"type": "object", "properties": {"a": {"type": "string", "description": "x"}}, **more}
)
FUNCTION = st.builds(
    lambda schema, more: {"name": "x", **more, **schema},
    st.one_of(
        *(SCHEMA.flatmap(either).map(lambda s, key=key: {key: s}) for key in ("parameters", "input_schema")),
        st.just({}),
    ),
    st.dictionaries(st.sampled_from(["description", "strict", "returns", "id"]), st.sampled_from(["x", True, ["x"]])),
)
TOOL = st.one_of(FUNCTION, FUNCTION.map(lambda f: {"type": "function", "function": f})).flatmap(either)
TOOL_LIST = st.one_of(st.lists(TOOL, min_size=1, max_size=2).flatmap(either), TOOL)
DECLARED = st.one_of(st.just({}), st.builds(lambda key, tools: {key: tools}, st.sampled_from(TOOLS), TOOL_LIST))

ARGUMENTS = OBJECT.flatmap(either)
CALL = st.one_of(
    st.builds(
        lambda key, value: {"name": "x", key: value}, st.sampled_from(["arguments", "parameters", "args"]), ARGUMENTS
    ),
    st.builds(
        lambda value, more: {"id": "x", "type": "function", "function": {"name": "x", "arguments": value}, **more},
        ARGUMENTS,
        st.sampled_from([{}, {}, {"index": 0}, {"unheard_of": "x"}, {"result": "x"}, {"output": "x"}]),
    ),
)
CALL_LIST = st.one_of(st.lists(CALL.flatmap(either), min_size=1, max_size=3).flatmap(either), CALL)
THOUGHTS = st.sampled_from(
    [
        "x",
        ["x", "x"],
        [{"type": "thinking", "thinking": "x", "signature": "x"}],
        [{"type": "reasoning.text", "text": "x", "id": "x"}, {"type": "reasoning.summary", "summary": "x"}],
        [{"type": "reasoning.encrypted", "data": "x"}],
        {"steps": "x"},
    ]
)
TEXT_PART = {"type": "text", "text": "x"}
PART = st.one_of(
    st.sampled_from(
        [
            *("x", TEXT_PART, {**TEXT_PART, "other": "x"}, {"type": "thinking", "thinking": "x", "signature": "x"}),
            *({"type": "image_url", "image_url": {"url": "x"}}, {"type": "reasoning", "summary": [TEXT_PART]}),
        ]
    ),
    st.builds(lambda a: {"type": "tool_use", "id": "x", "name": "x", "input": a}, OBJECT),
    st.builds(lambda content: {"type": "tool_result", "tool_use_id": "x", "content": content}, JSON),
)
NAMES = sorted(CONTENT | HARMLESS | {"unheard_of", "other"})
EXTRA = st.dictionaries(
    st.sampled_from(NAMES), st.sampled_from(["x", ["x", "x"], {"k": "x"}, 1, None, True]), max_size=2
)
SOME_EXTRA = st.one_of(st.just({}), st.just({}), EXTRA)


def maybe(keys: tuple[str, ...], values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(st.just({}), st.builds(lambda key, value: {key: value}, st.sampled_from(keys), values))


ANSWER = st.builds(
    lambda content, *more: {"role": "assistant", "content": content, **{k: v for one in more for k, v in one.items()}},
    st.one_of(st.sampled_from(["x", "x", None, ""]), st.lists(PART, min_size=1, max_size=4)),
    maybe(REASONING, THOUGHTS),
    maybe(CALLS, CALL_LIST),
    maybe((*FLAGS, *MASKS), st.sampled_from([0, 1])),
    SOME_EXTRA,
)
RESULT = st.builds(
    lambda role, content, more: {"role": role, "content": content, **more},
    st.sampled_from(["tool", "observation", "ipython"]),
    JSON,
    st.sampled_from([{}, {"name": "x", "tool_call_id": "x"}]),
)
USER = st.builds(
    lambda content, more: {"role": "user", "content": content, **more},
    st.one_of(st.just("x"), st.just("x"), st.lists(PART, max_size=3)),
    SOME_EXTRA,
)
SYSTEM = st.builds(lambda tools, more: {"role": "system", "content": "x", **tools, **more}, DECLARED, SOME_EXTRA)
CALLING = st.builds(lambda calls: {"from": "function_call", "value": calls}, CALL_LIST)
TURNS = st.lists(st.one_of(ANSWER, CALLING, RESULT, USER, SYSTEM), min_size=1, max_size=5)
ASKED = st.sampled_from(
    [
        {"instruction": "x", "input": "x", "output": "x"},
        {"instruction": "x", "output": "x", "history": [["x", "x"]]},
        {"prompt": "x", "completion": "x", "system": "x"},
        {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "x"}]},
        {"question": "x", "context": "x", "answer": "x"},
        {"text": "x"},
        {
            "prompt": {
                "role": "prompter",
                "text": "x",
                "replies": [{"role": "assistant", "text": "x", "message_id": "x"}],
            }
        },
    ]
)
CHAT_KEYS = st.sampled_from(["messages", "conversations", "conversation"])
BESIDE = st.one_of(maybe(REASONING, THOUGHTS), maybe(CALLS, CALL_LIST))
ANSWERS = st.lists(CALL, min_size=1, max_size=2).flatmap(either)
RECORD = st.one_of(
    st.builds(lambda key, turns: {key: turns}, CHAT_KEYS, TURNS.flatmap(either)),
    st.builds(lambda asked, more: {**asked, **more}, ASKED, BESIDE),
    st.builds(lambda calls: {"query": "x", "answers": calls, "id": "x"}, ANSWERS),
)
SIDE = st.one_of(st.just("x"), ANSWER, TURNS.flatmap(lambda turns: ANSWER.map(lambda a: [*turns, a])))
PAIR = st.builds(
    lambda prompt, chosen, rejected: {**prompt, "chosen": chosen, "rejected": rejected},
    st.sampled_from(
        [
            {"prompt": "x"},
            {"prompt": [{"role": "user", "content": "x"}]},
            {"instruction": "x", "input": "x"},
            {"question": "x", "system": "x"},
            {"conversations": [{"from": "human", "value": "x"}]},
        ]
    ),
    SIDE,
    SIDE,
)


def planted(value: Any, marks: Iterator[int]) -> Any:
    """A copy in which every text is a marker of its own: `MARKn-`. Roles and types stay: they say what the rest is."""
    if isinstance(value, AsText):
        return json.dumps(planted(value.value, marks))
    if isinstance(value, str):
        return f"MARK{next(marks)}-" if value == "x" else value
    if isinstance(value, list):
        return [planted(part, marks) for part in value]
    if isinstance(value, dict):
        return {k: v if k in ("role", "from", "type") else planted(v, marks) for k, v in value.items()}
    return value


# --- Where the markers went --------------------------------------------------------------------------


def opened(value: Any) -> Any:
    """A value with its texts of JSON read."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        return opened(json.loads(value))
    if isinstance(value, list):
        return [opened(part) for part in value]
    return {k: opened(v) for k, v in value.items()} if isinstance(value, dict) else value


def marks_in(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value} if value.startswith("MARK") else set()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(marks_in, parts))


DATA = {*TOOLS, "arguments", "parameters", "args", "input"}  # whatever a key within them is called, it is content


def explained(value: Any, counted: set[str]) -> Iterator[str]:
    """Markers under keys that are counted as harmless or unknown."""
    if isinstance(value, dict):
        for name, held in value.items():
            if name in counted:
                yield from marks_in(held)
            elif name not in DATA:
                yield from explained(held, counted)
    elif isinstance(value, list):
        for part in value:
            yield from explained(part, counted)


SPOKEN = {"output", "completion", "answer", "answers", "text", "chosen", "rejected", *REASONING, *CALLS}


def said(value: Any) -> Iterator[str]:
    """Markers of what assistants say: supervised, unless a flag says no."""
    if isinstance(value, list):
        for part in value:
            yield from said(part)
    elif isinstance(value, dict) and ("role" in value or "from" in value):
        supervised = all(value.get(flag) in (None, 1) for flag in FLAGS)
        supervised = supervised and all(value.get(mask) in (None, 0) for mask in MASKS)
        if supervised and value.get("role", value.get("from")) in ("assistant", "function_call"):
            yield from marks_in({name: held for name, held in value.items() if name != "replies"})
        yield from said(value.get("replies", []))
    elif isinstance(value, dict):
        for name, held in value.items():
            parts = held if isinstance(held, list) else [held]
            turns = all(isinstance(part, dict) and not {"role", "from"}.isdisjoint(part) for part in parts)
            if name == "history":
                yield from marks_in([pair[1] for pair in held if isinstance(pair, list) and len(pair) == 2])
            elif name in SPOKEN and not turns:
                yield from marks_in(held)
            else:
                yield from said(held)


def check(record: Any, conversations: list[Conversation], tally: FieldTally) -> None:
    supervised = context = ""
    for conversation in conversations:
        block, refused = AGENT_TOKENIZER.render_valid([conversation])
        assert not refused
        supervised += AGENT_TOKENIZER.decode(block.ids[block.mask == 1].tolist())
        context += AGENT_TOKENIZER.decode(block.ids[block.mask == 0].tolist())
    totals = tally.totals()
    whole = opened(record)
    counted = set(totals.get("harmless", {})) | set(totals.get("unknown", {}))
    lost = {mark for mark in marks_in(whole) if mark not in supervised and mark not in context}
    assert lost <= set(explained(whole, counted))
    spoken = set(said(whole))
    # A result without a name of its own bears that of its call.
    called = {call.name for one in conversations for message in one.messages for call in message.tool_calls}
    assert {mark for mark in spoken if mark in context} <= set(marks_in(sorted(called)))
    assert {mark for mark in marks_in(whole) - spoken if mark in supervised} == set()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RECORD, DECLARED, SOME_EXTRA)
def test_every_marker_is_trained_masked_or_counted(base: Any, tools: Any, extra: Any) -> None:
    record = planted({**base, **tools, **extra}, iter(range(10_000)))
    tally = FieldTally()
    found = convert(record, tally=tally)
    if isinstance(found, Fault):
        assert found.reason  # refused, and counted under this
        return
    check(record, found.conversations if isinstance(found, Tree) else [found], tally)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PAIR, DECLARED, SOME_EXTRA)
def test_every_marker_of_a_pair_too(base: Any, tools: Any, extra: Any) -> None:
    record = planted({**base, **tools, **extra}, iter(range(10_000)))
    tally = FieldTally()
    found = from_pair(record, tally)
    if isinstance(found, Fault):
        assert found.reason
        return
    assert isinstance(found, Pair)
    check(record, list(found), tally)
