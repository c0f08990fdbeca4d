"""Tools over HTTP with an imported model's template: Qwen3's, of a small vocabulary, and OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.infer.serve.running_server import Running, running
from tests.infer.taught_models import ANSWER, ASKED, CALLS, GREETING, REASONING, WEATHER, taught_qwen3

pytest.importorskip("trl", reason="trl is not installed: the templates are its own")

TOOLS: list[Any] = [json.loads(WEATHER)]
QUESTION: list[Any] = [{"role": "user", "content": ASKED.content}]
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WANTED = [(call.name, call.arguments) for call in CALLS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(taught_qwen3(tmp_path_factory.mktemp("runs") / "qwen")) as started:
        yield started


def ask(server: Running, messages: list[Any], **more: Any) -> Any:
    settings: Any = {"model": "qwen", "temperature": 0, "max_tokens": 200} | more
    return server.client().chat.completions.create(messages=messages, **settings)


def test_a_conversation_with_tools(server: Running) -> None:
    first = ask(server, QUESTION, tools=TOOLS).choices[0]
    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    assert first.message.reasoning_content == REASONING
    calls = first.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == WANTED
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": text}
        for call, text in zip(calls, ("rain", "sun"), strict=True)
    ]
    second = ask(server, [*QUESTION, first.message.model_dump(), *results], tools=TOOLS).choices[0]
    assert (second.finish_reason, second.message.content, second.message.tool_calls) == ("stop", ANSWER, None)
    assert ask(server, HELLO).choices[0].message.content == GREETING


def test_streamed(server: Running) -> None:
    chunks = list(ask(server, QUESTION, tools=TOOLS, stream=True, n=2))
    for choice in (0, 1):
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice]
        reasoning = [getattr(part.delta, "reasoning_content", None) or "" for part in parts]
        assert "".join(reasoning) == REASONING
        assert "".join(part.delta.content or "" for part in parts) == ""
        calls = [call for part in parts for call in part.delta.tool_calls or []]
        assert [call.index for call in calls] == [0, 1]
        assert [(call.function.name, call.function.arguments) for call in calls] == WANTED
        assert [part.finish_reason for part in parts if part.finish_reason] == ["tool_calls"]


def test_calls_and_reasoning_that_are_not_wanted(server: Running) -> None:
    none = ask(server, QUESTION, tools=TOOLS, tool_choice="none").choices[0]
    assert none.message.tool_calls is None
    quiet = ask(server, QUESTION, tools=TOOLS, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert getattr(quiet.choices[0].message, "reasoning_content", None) is None
    one = ask(server, QUESTION, tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert [(call.function.name, call.function.arguments) for call in one.message.tool_calls] == WANTED[:1]


def test_strict_functions(server: Running) -> None:
    """Whatever the model would say, the call is of a declared tool and its arguments are of the schema."""
    parameters = {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/place"}},
        "required": ["place"],
        "additionalProperties": False,
        "$defs": {"place": {"enum": ["Rome", "Lima"]}},
    }
    tools = [{"type": "function", "function": {"name": "maps:find", "strict": True, "parameters": parameters}}]
    got = ask(server, HELLO, tools=tools, tool_choice="required", temperature=1.5, seed=3, n=4)
    for choice in got.choices:
        assert choice.finish_reason == "tool_calls"
        for call in choice.message.tool_calls:
            assert call.function.name == "maps:find"
            assert json.loads(call.function.arguments)["place"] in ("Rome", "Lima")
