"""Tools, tool calls and their results, in every form that data sets have them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumina.chat import Conversation, Message, ToolCall
from lumina.data import validate
from lumina.data.converting.fixing import write_fixed
from lumina.data.formats import convert
from lumina.data.reading.items import read_items
from lumina.data.reading.layout import detect
from lumina.data.records.fault import BAD_ARGUMENTS, BAD_CALL, BAD_TOOL, PYTHON_LITERAL, TWICE, Fault
from tests.data.helpers import AGENT_TOKENIZER, write_jsonl

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "Where, in «city» form"}}}
FUNCTION = {"name": "get_weather", "description": "Weather now", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = ToolCall("get_weather", '{"city": "Zürich"}')
ARGUMENTS = {"city": "Zürich"}
USER, RESULT, LAST = Message("user", "q"), Message("tool", '{"t": 4}'), Message("assistant", "It is 4.")


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def read(record: Any) -> Conversation:
    found = convert(record)
    assert isinstance(found, Conversation), found
    return found


def asked(**more: Any) -> dict[str, Any]:
    return {"messages": [turn("user", "q"), turn("assistant", "a")], **more}


def answered(**more: Any) -> dict[str, Any]:
    """A conversation in which the assistant calls a tool."""
    return {
        "messages": [
            turn("user", "q"),
            turn("assistant", None) | more,
            turn("tool", '{"t": 4}'),
            turn("assistant", "It is 4."),
        ]
    }


# --- Tools -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["tools", "functions", "available_tools"])
@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        TOOL,
        [FUNCTION],
        [{"type": "function", **FUNCTION}],
        [{"function": FUNCTION}],
        json.dumps([TOOL]),
        json.dumps([FUNCTION], indent=2),
        json.dumps(TOOL),
        [json.dumps(TOOL)],
        [{**FUNCTION, "parameters": json.dumps(SCHEMA)}],
        [{"name": "get_weather", "description": "Weather now", "input_schema": SCHEMA}],
        [{"type": "custom", "name": "get_weather", "description": "Weather now", "inputSchema": SCHEMA}],
    ],
)
def test_tools_in_every_form_become_openais(key: str, tools: Any) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for record in (
        asked(**{key: tools}),
        {"conversations": turns, key: tools},
        {"prompt": "q", "completion": "a", key: tools},
        {"instruction": "q", "output": "a", key: tools},
        {"question": "q", "answer": "a", key: tools},
        {"messages": [turn("system", "", **{key: tools}), turn("user", "q"), turn("assistant", "a")]},
        asked(tools=[TOOL]) | {key: tools},
    ):
        (found,) = read(record).tools
        assert json.loads(found) == TOOL
    assert list(read(asked(**{key: tools})).messages) == [USER, Message("assistant", "a")]


@pytest.mark.parametrize("nothing", [None, [], "[]", "", {}, "{}", [None]])
def test_no_tools_are_no_tools(nothing: Any) -> None:
    assert read(asked(tools=nothing)).tools == ()


def test_every_key_of_a_tool_is_kept_and_several_keep_their_order() -> None:
    odd = {"name": "odd", "strict": True, "parameters": {"city": {"type": "str", "default": None}}, "returns": "text"}
    found = read(asked(tools=[odd, {**TOOL, "note": "n"}])).tools
    assert [json.loads(tool) for tool in found] == [{"type": "function", "function": odd}, {**TOOL, "note": "n"}]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (asked(tools=["get_weather"]), BAD_TOOL),
        (asked(tools="get_weather(city)"), BAD_TOOL),
        (asked(tools=[{"type": "function"}]), BAD_TOOL),
        (asked(tools=[{"type": "function", "function": {"name": " "}}]), BAD_TOOL),
        (asked(tools=7), BAD_TOOL),
        (asked(tools=[{"type": "web_search"}]), "field not used: a tool of type web_search"),
        (asked(tools=[TOOL], functions=[{"name": "other"}]), TWICE),
        ({"messages": [turn("system", "s", tools=[TOOL]), turn("user", "q"), turn("assistant", "a")],
          "tools": [{"name": "other"}]}, TWICE),
    ],
)  # fmt: skip
def test_tools_that_are_none_are_refused(record: Any, reason: str) -> None:
    found = convert(record)
    assert isinstance(found, Fault), found
    assert found.reason == reason


# --- Calls -------------------------------------------------------------------------------------------

WRAPPED = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}


@pytest.mark.parametrize("content", [None, "", " \n", "Let me look."])
@pytest.mark.parametrize(
    "said",
    [
        {"tool_calls": [WRAPPED]},
        {"tool_calls": WRAPPED},
        {"tool_calls": json.dumps([WRAPPED])},
        {"tool_calls": [json.dumps(WRAPPED)]},
        {"tool_calls": [{**WRAPPED, "index": 0, "function": {"name": "get_weather", "arguments": ARGUMENTS}}]},
        {"tool_calls": [{"name": "get_weather", "arguments": ARGUMENTS}]},
        {"tool_calls": [{"name": "get_weather", "parameters": ARGUMENTS}]},
        {"tool_calls": [{"name": "get_weather", "args": ARGUMENTS, "id": "c1", "type": "tool_call"}]},
        {"tool_calls": [{"function": "get_weather", "arguments": ARGUMENTS}]},
        {"tool_call": {"name": "get_weather", "arguments": ARGUMENTS}},
        {"function_call": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}},
        {"function_call": {"name": "get_weather", "arguments": ARGUMENTS}, "tool_calls": [WRAPPED]},
    ],
)
def test_calls_in_every_form(said: dict[str, Any], content: Any) -> None:
    found = (
        list(read(answered(**said) | {"tools": [TOOL]}).messages)
        if content is None
        else list(read(answered(**said, content=content)).messages)
    )
    calls = tuple(call._replace(id="") for call in found[1].tool_calls)
    assert found == [USER, Message("assistant", (content or "").strip(), tool_calls=found[1].tool_calls), RESULT, LAST]
    assert calls == (CALL,)
    assert {call.id for call in found[1].tool_calls} <= {"c1", ""}


@pytest.mark.parametrize("role", ["function_call", "Tool_Call", "tool_calls"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_role_whose_content_is_the_calls(role: str, several: bool, as_text: bool) -> None:
    call = {"name": "get_weather", "arguments": ARGUMENTS}
    value: Any = [call, call] if several else call
    turns = [
        {"from": "human", "value": "q"},
        {"from": role, "value": json.dumps(value, ensure_ascii=False) if as_text else value},
        {"from": "observation", "value": '{"t": 4}'},
        {"from": "gpt", "value": "It is 4."},
    ]
    calls = (CALL, CALL) if several else (CALL,)
    assert list(read({"conversations": turns}).messages) == [
        USER, Message("assistant", "", tool_calls=calls), RESULT, LAST
    ]  # fmt: skip


def test_a_text_of_arguments_is_kept_letter_for_letter() -> None:
    for text in ('{"b":1,  "a": [2 ],"b":3}', '{"s": "\\u00e9\\n"}', "{}"):
        found = read(answered(tool_calls=[{"name": "f", "arguments": text}]))
        assert found.messages[1].tool_calls == (ToolCall("f", text),)
    for nothing in (None, "", " ", {}):
        found = read(answered(tool_calls=[{"name": "f", "arguments": nothing}]))
        assert found.messages[1].tool_calls == (ToolCall("f", "{}"),)


@pytest.mark.parametrize(
    "arguments", ["city=Oslo", '{"city": "Oslo"', "[1]", "7", "null", '"x"', [1], 7, True, "{'a': 1}"]
)
@pytest.mark.parametrize("how", ["flat", "wrapped", "role", "part"])
def test_arguments_that_are_no_object_are_refused_with_an_example(arguments: Any, how: str, tmp_path: Path) -> None:
    call = {"name": "get_weather", "arguments": arguments}
    turns = {
        "flat": turn("assistant", None, tool_calls=[call]),
        "wrapped": turn("assistant", "x", tool_calls=[{"function": call}]),
        "role": turn("function_call", call),
        "part": turn("assistant", [{"type": "tool_use", "name": "get_weather", "input": arguments}]),
    }
    record = {"messages": [turn("user", "q"), turns[how], turn("assistant", "a")]}
    path = write_jsonl(tmp_path / "d.jsonl", [record, asked()])
    account = validate([str(path)], AGENT_TOKENIZER, workers=1).account
    account.check()
    assert (account.records, account.bad_lines) == (1, 1)
    assert "get_weather" in account.faults[BAD_ARGUMENTS].example


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (turn("assistant", None, tool_calls=["get_weather"]), BAD_CALL),
        (turn("assistant", None, tool_calls=[{"id": "c"}]), BAD_CALL),
        (turn("assistant", None, tool_calls=[{"name": 3, "arguments": {}}]), BAD_CALL),
        (turn("function_call", "get_weather(city=Oslo)"), BAD_CALL),
        (turn("assistant", None, tool_calls=[{"type": "custom", "custom": {"name": "x", "input": "y"}}]),
         "field not used: a tool call of type custom"),
        (turn("assistant", None, tool_calls=[{"name": "f", "arguments": {}, "output": "4"}]), "field not used: output"),
        (turn("assistant", None, tool_calls=[{"name": "f", "arguments": {}, "result": 4}]), "field not used: result"),
        (turn("assistant", None, tool_calls=[{"name": "f"}], function_call={"name": "g"}), TWICE),
        (turn("assistant", None, tool_calls=[{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}]), TWICE),
        (turn("assistant", None, tool_calls=[{"name": "f", "function": {"name": "g"}}]), TWICE),
    ],
)  # fmt: skip
def test_calls_that_are_none_are_refused(message: dict[str, Any], reason: str) -> None:
    found = convert({"messages": [turn("user", "q"), message, turn("assistant", "a")]})
    assert isinstance(found, Fault), found
    assert found.reason == reason


def test_questions_answered_by_calls() -> None:
    """xLAM's columns, as JSON texts; and `tool_calls` beside a prompt."""
    answers = [{"name": "get_weather", "arguments": ARGUMENTS}]
    record = {
        "id": 7,
        "query": "q",
        "answers": json.dumps(answers, ensure_ascii=False),
        "tools": json.dumps([FUNCTION]),
    }
    for one in (record, {**record, "answers": answers}, {"prompt": "q", "tool_calls": answers, "tools": [TOOL]}):
        found = read(one)
        assert list(found.messages) == [USER, Message("assistant", "", tool_calls=(CALL,))]
        assert [json.loads(tool) for tool in found.tools] == [TOOL]
    for other in ({"question": "q", "answers": ["a", "b"]}, {"question": "q", "answers": {"text": ["a"]}}):
        assert isinstance(convert(other), Fault)
    beside = convert({"question": "q", "answer": "a", "answers": json.dumps(answers)})
    assert isinstance(beside, Fault)
    assert beside.reason == "field not used: answers"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": 0}])
def test_a_flagged_call_is_context_and_a_call_alone_is_supervised(flag: dict[str, Any]) -> None:
    record = {"messages": [turn("user", "q"), turn("assistant", None, tool_calls=[WRAPPED], **flag)]}
    found = convert(record)
    assert isinstance(found, Fault)
    assert found.reason == "no assistant turn"
    del record["messages"][1][next(iter(flag))]
    assert read(record).messages[1].supervise


def test_content_that_is_masked_whole_leaves_its_calls_supervised() -> None:
    spans = [{"begin_offset": 0, "end_offset": 3, "train": False}]
    found = read(answered(content="hmm.", tool_calls=[WRAPPED], train_detail=spans)).messages[1]
    assert found.supervise
    assert found.masked == ((0, 4),)


# --- Results -----------------------------------------------------------------------------------------

ROLES = ["tool", "observation", "function", "ipython", "function_response", "tool_response", "TOOL"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        ({"t": 4, "in": "Zürich"}, '{"t": 4, "in": "Zürich"}'),
        ([{"name": "a"}, 2], '[{"name": "a"}, 2]'),
        ([{"type": "file", "path": "a.py"}], '[{"type": "file", "path": "a.py"}]'),
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        ({"type": "text", "text": "one"}, "one"),
        (4.5, "4.5"),
        (True, "true"),
        (None, ""),
        ("", ""),
        ([], "[]"),
    ],
)
def test_a_result_may_be_any_json(role: str, content: Any, text: str) -> None:
    for turns in (
        {"messages": [turn("user", "q"), turn(role, content), turn("assistant", "a")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": role, "value": content}, turn("assistant", "a")]},
    ):
        assert read(turns).messages[1] == Message("tool", text)


def test_a_results_name_and_id() -> None:
    for more in ({"name": "f", "tool_call_id": "c1"}, {"tool_name": "f", "call_id": "c1"}):
        found = read({"messages": [turn("user", "q"), turn("tool", "r", **more), turn("assistant", "a")]})
        assert found.messages[1] == Message("tool", "r", name="f", call_id="c1")


def test_a_result_that_is_an_image_is_refused() -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    found = convert({"messages": [turn("user", "q"), turn("tool", image), turn("assistant", "a")]})
    assert isinstance(found, Fault)
    assert found.reason == "field not used: content of type image_url"


# --- Around them -------------------------------------------------------------------------------------


def test_what_is_undeclared_or_unasked_is_used_and_shown(tmp_path: Path) -> None:
    other = {"messages": [turn("user", "q"), turn("tool", "r"), turn("assistant", "a")]}
    path = write_jsonl(tmp_path / "d.jsonl", [answered(tool_calls=[WRAPPED]), other])
    validation = validate([str(path)], AGENT_TOKENIZER, workers=1)
    assert validation.account.bad_lines == 0
    counts = {what: found.count for what, found in validation.statistics.findings.items()}
    assert counts == {"a call of a tool that is not declared": 1, "a tool's result without a call": 1}
    assert validation.statistics.roles == {"user": 2, "assistant": 3, "tool": 2}


def test_parquet_gives_every_tool_the_keys_of_all_and_they_are_not_its_own(tmp_path: Path) -> None:
    other = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
    record = answered(
        tool_calls=[{"name": "get_weather", "arguments": ARGUMENTS}, {"name": "add", "arguments": {"a": 1}}]
    )
    pq.write_table(pa.Table.from_pylist([{**record, "tools": [FUNCTION, other]}]), tmp_path / "d.parquet")
    (item,) = read_items(str(tmp_path / "d.parquet"), detect(str(tmp_path / "d.parquet")))
    found = read(item.record)
    assert [json.loads(tool)["function"] for tool in found.tools] == [FUNCTION, other]
    assert found.messages[1].tool_calls == (CALL, ToolCall("add", '{"a": 1}'))


def test_what_fix_writes_is_read_as_the_same(tmp_path: Path) -> None:
    records = [
        answered(tool_calls=[WRAPPED], content="Let me look.", reasoning="Weather.") | {"tools": [TOOL], "id": "k"},
        answered(function_call={"name": "f"}),
        {"messages": [turn("user", "q"), turn("tool", None, name="f", tool_call_id="7"), turn("assistant", "a")]},
        {"query": "q", "answers": [{"name": "f", "arguments": {"a": None}}], "tools": [FUNCTION]},
        {
            "messages": [
                turn("system", "", tools=[TOOL]),
                turn("user", "q"),
                turn("assistant", "", reasoning_content="r"),
            ]
        },
        answered(tool_calls=[WRAPPED], train=False),
    ]
    path, fixed = write_jsonl(tmp_path / "d.jsonl", records), tmp_path / "fixed.jsonl"
    assert write_fixed([str(path)], fixed)[:2] == (len(records), 0)
    again = [read(item.record) for item in read_items(str(fixed), detect(str(fixed)))]
    assert again == [read(record) for record in records]


def test_python_literals_are_named_as_such() -> None:
    call = turn("assistant", None, tool_calls=str([{"name": "get_weather", "arguments": ARGUMENTS}]))
    for record in (asked(tools=str([TOOL])), {"messages": [turn("user", "q"), call]}):
        found = convert(record)
        assert isinstance(found, Fault)
        assert found.reason == PYTHON_LITERAL
