"""Requests as clients really send them: each is answered, or refused in one sentence that names the field; none ends in
a failure of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.infer.serve.running_server import Running, running
from tests.infer.taught_models import taught

U: Any = {"role": "user", "content": "Hello"}
F: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL: Any = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED: Any = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT: Any = {"role": "tool", "tool_call_id": "c1", "content": "4"}
NAMED: Any = {"type": "function", "function": {"name": "g"}}
DEEP: Any = {}
for _ in range(40):
    DEEP = {"a": DEEP}

ANSWERED: dict[str, Any] = {
    "no settings": {},
    "nulls": {"stop": None, "n": None, "stream": None, "tools": None, "top_k": None, "made_up": None, "logprobs": None},
    "no effect": {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "presence_penalty": 0.0},
    "more of them": {"logit_bias": {}, "frequency_penalty": 0, "best_of": 1, "skip_special_tokens": True},
    "temperature 0.01": {"temperature": 0.01},
    "temperature 2": {"temperature": 2},
    "top_p 0": {"top_p": 0},
    "top_k 100000000": {"top_k": 100_000_000},
    "top_k -1": {"top_k": -1},
    "seed -1": {"seed": -1},
    "empty stop": {"stop": ""},
    "empty stops": {"stop": []},
    "stops, one empty": {"stop": ["", "x"]},
    "max_tokens beyond all": {"max_tokens": 100_000},
    "both limits": {"max_tokens": 3, "max_completion_tokens": 2},
    "message id": {"messages": [{**U, "id": "m1", "name": "Ann"}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]},
    "developer": {"messages": [{"role": "developer", "content": "s"}, U]},
    "empty fields back": {
        "messages": [U, {"role": "assistant", "content": "x", "tool_calls": [], "refusal": None, "annotations": []}, U]
    },
    "reasoning back": {"messages": [U, {"role": "assistant", "content": "x", "reasoning": "r"}, U]},
    "reasoning_content back": {"messages": [U, {"role": "assistant", "content": "x", "reasoning_content": "r"}, U]},
    "refusal back": {"messages": [U, {"role": "assistant", "content": None, "refusal": "no"}, U]},
    "null content": {"messages": [U, {"role": "assistant", "content": None}, U]},
    "tools": {"tools": [F]},
    "no tools": {"tools": [], "tool_choice": "auto"},
    "tool choice none": {"tools": [F], "tool_choice": "none"},
    "called and answered": {"tools": [F], "messages": [U, CALLED, RESULT]},
    "a result without an id": {"messages": [U, CALLED, {"role": "tool", "content": "4"}]},
    "the older call": {
        "messages": [
            U,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "4"},
        ]
    },
    "arguments as an object": {
        "messages": [
            U,
            {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "4"},
        ]
    },
    "reasoning_effort": {"reasoning_effort": "high"},
    "enable_thinking": {"chat_template_kwargs": {"enable_thinking": False}},
    "response_format text": {"response_format": {"type": "text"}},
    "stream_options": {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
}  # fmt: skip
REFUSED: dict[str, tuple[Any, str]] = {
    "temperature 2.1": ({"temperature": 2.1}, "temperature"),
    "top_p -1": ({"top_p": -1}, "top_p"),
    "seed of 70 bits": ({"seed": 2**70}, "seed"),
    "max_completion_tokens 0": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "stop of numbers": ({"stop": [1]}, "stop"),
    "logit_bias": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "unknown": ({"made_up": 1}, "made_up"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        "messages.content",
    ),
    "null of a user": ({"messages": [{"role": "user", "content": None}]}, "messages.content"),
    "no role": ({"messages": [{"content": "x"}]}, "messages.role"),
    "a result of no call": ({"messages": [U, RESULT]}, "messages.tool_call_id"),
    "a user's calls": ({"messages": [{**U, "tool_calls": [CALL]}]}, "messages.tool_calls"),
    "bad arguments": (
        {"messages": [U, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages.tool_calls.function.arguments",
    ),
    "tool choice of no tool": ({"tools": [F], "tool_choice": NAMED}, "tool_choice"),
    "required without tools": ({"tool_choice": "required"}, "tool_choice"),
    "two of one name": ({"tools": [F, F]}, "tools"),
    "a custom tool": ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
    "strict": ({"tools": [{"type": "function", "function": {"name": "f", "strict": 7}}]}, "tools.function.strict"),
    "deep": ({"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, "tools"),
    "deep schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "d", "schema": DEEP}}},
        "response_format.json_schema.schema",
    ),
    "129 tools": ({"tools": [F] * 129}, "tools"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities"),
    "other template settings": ({"chat_template_kwargs": {"date": "x"}}, "chat_template_kwargs.date"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(taught(tmp_path_factory.mktemp("runs") / "taught")) as started:
        yield started


def post(server: Running, body: Any) -> httpx.Response:
    return server.post(json=body)


@pytest.mark.parametrize("name", ANSWERED)
def test_answered(server: Running, name: str) -> None:
    answer = post(server, {"messages": [U], "max_tokens": 2, **ANSWERED[name]})
    assert answer.status_code == 200, answer.text


def test_a_limit_beyond_the_context_is_clamped_and_said(server: Running) -> None:
    whole = post(server, {"messages": [U], "max_tokens": 100_000, "temperature": 0})
    room = 512 - whole.json()["usage"]["prompt_tokens"]
    assert whole.headers["lumina-max-tokens"] == str(room)
    assert "lumina-max-tokens" not in post(server, {"messages": [U], "max_tokens": room}).headers
    assert "lumina-max-tokens" not in post(server, {"messages": [U]}).headers


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(server: Running, name: str) -> None:
    settings_, param = REFUSED[name]
    answer = post(server, {"messages": [U], "max_tokens": 2, **settings_})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), answer.text
    assert error["message"].startswith(param)
    assert len(error["message"].splitlines()) == 1


FIELDS = [
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "stop",
    "n",
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "logprobs",
    "top_logprobs",
    "stream",
    "max_tokens",
    "chat_template_kwargs",
    "reasoning_effort",
    "parallel_tool_calls",
    "functions",
    "stream_options",
    "role",
    "content",
    "name",
    "type",
    "function",
    "parameters",
    "arguments",
    "tool_calls",
    "tool_call_id",
    "id",
    "reasoning",
    "schema",
    "json_schema",
    "enable_thinking",
    "include_usage",
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.just(2**80),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(
        ["user", "assistant", "tool", "function", "json_schema", "auto", "required", "text", "{}", "object"]
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5), st.booleans(), st.sampled_from(["chat/", ""]))
def test_nothing_that_a_client_sends_fails_the_server(server: Running, body: Any, whole: bool, kind: str) -> None:
    base: Any = {"messages": [U], "max_tokens": 1} if kind else {"prompt": "x", "max_tokens": 1}
    text = json.dumps({**base, **body} if whole else {**body, **base})
    answer = server.post(f"/v1/{kind}completions", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
