"""Tools, tool calls and reasoning over HTTP: a model that was taught them, and OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.browser import Browser, needs_browser
from tests.infer.serve.running_server import Running, running, wait_for
from tests.infer.small_models import write_small_run
from tests.infer.taught_models import ANSWER, ASKED, CALLS, GREETING, REASONING, WEATHER, taught

TOOLS: list[Any] = [json.loads(WEATHER)]
OTHER: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
QUESTION: list[Any] = [{"role": "user", "content": ASKED.content}]
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(taught(tmp_path_factory.mktemp("runs") / "taught")) as started:
        yield started


def ask(server: Running, messages: list[Any], **more: Any) -> Any:
    client = server.client()
    return client.chat.completions.create(model="taught", messages=messages, temperature=0, max_tokens=100, **more)


def test_a_conversation_with_tools(server: Running) -> None:
    """The calls with ids, their results, the answer; what was answered goes back as the client has it."""
    first = ask(server, QUESTION, tools=TOOLS)
    choice = first.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.reasoning_content == REASONING
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("function", call.name, call.arguments) for call in CALLS
    ]
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") for call in calls)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": text}
        for call, text in zip(calls, ("rain", "sun"), strict=True)
    ]
    second = ask(server, [*QUESTION, choice.message.model_dump(), *results], tools=TOOLS)
    assert (second.choices[0].finish_reason, second.choices[0].message.content) == ("stop", ANSWER)
    assert second.choices[0].message.tool_calls is None
    third = ask(server, [*QUESTION, choice.message, *results], tools=TOOLS)
    assert third.choices[0].message.content == ANSWER
    assert third.usage.prompt_tokens == second.usage.prompt_tokens


def test_streamed(server: Running) -> None:
    chunks = list(ask(server, QUESTION, tools=TOOLS, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    reasoning = [delta.reasoning_content for delta in deltas if getattr(delta, "reasoning_content", None)]
    assert len(reasoning) > 2
    assert "".join(reasoning) == REASONING
    assert "".join(delta.content or "" for delta in deltas) == ""
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (at, call.name, call.arguments) for at, call in enumerate(CALLS)
    ]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
    with server.client().chat.completions.stream(
        model="taught", messages=QUESTION, tools=TOOLS, temperature=0, max_tokens=100
    ) as stream:  # the client puts the pieces together by itself
        message = stream.get_final_completion().choices[0].message
    assert [call.function.arguments for call in message.tool_calls or []] == [call.arguments for call in CALLS]


def test_tool_choice(server: Running) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in (named, "required"):
        got = ask(server, HELLO, tools=TOOLS, tool_choice=choice)  # which is answered with a greeting else
        assert got.choices[0].message.tool_calls[0].function.name == "get_weather"
        assert json.loads(got.choices[0].message.tool_calls[0].function.arguments)
        assert got.choices[0].finish_reason == "tool_calls"
    plain = ask(server, HELLO)
    assert plain.choices[0].message.content == GREETING
    counted = ask(server, HELLO, tools=TOOLS, tool_choice="required")
    whole = ask(server, HELLO, tools=TOOLS, tool_choice="auto")
    assert counted.usage.prompt_tokens == whole.usage.prompt_tokens  # the forced opening is the answer's
    none = ask(server, QUESTION, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.tool_calls is None
    assert none.usage.prompt_tokens == ask(server, QUESTION).usage.prompt_tokens  # the tools are not shown
    one = ask(server, QUESTION, tools=TOOLS, parallel_tool_calls=False)
    assert [call.function.arguments for call in one.choices[0].message.tool_calls] == [CALLS[0].arguments]
    assert one.choices[0].finish_reason == "tool_calls"


def test_strict_functions(server: Running) -> None:
    """Calls are held to declared names and to the schema, whose references are to its own root."""
    node: dict[str, Any] = {"type": "object", "properties": {"in": {"$ref": "#"}, "city": {"enum": ["Rome", "Lima"]}}}
    node |= {"required": ["city"], "additionalProperties": False}
    tools: list[Any] = [{"type": "function", "function": {"name": "find", "strict": True, "parameters": node}}]
    got = ask(server, HELLO, tools=tools, tool_choice="required", n=4)
    for choice in got.choices:
        assert choice.finish_reason == "tool_calls"
        for call in choice.message.tool_calls:
            assert call.function.name == "find"
            assert json.loads(call.function.arguments)["city"] in ("Rome", "Lima")
    plain = [{"type": "function", "function": tools[0]["function"] | {"strict": False}}]
    assert got.usage.prompt_tokens == ask(server, HELLO, tools=plain).usage.prompt_tokens
    strict: Any = {"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}
    parsed = server.client().chat.completions.parse(
        model="taught", messages=QUESTION, tools=[strict], temperature=0, max_tokens=100
    )
    calls = parsed.choices[0].message.tool_calls or []
    assert [call.function.parsed_arguments for call in calls] == [{"city": "Oslo"}, {"city": "Bergen"}]
    bad = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {"type": "string"}}}}
    with pytest.raises(openai.BadRequestError, match="the schema cannot be kept"):
        ask(server, HELLO, tools=[bad])


def test_a_forced_call_keeps_to_the_limits(server: Running) -> None:
    """Also where neither max_tokens nor the context leaves room for the call's opening, and nobody else suffers."""
    for most in (1, 3):
        got = server.client().chat.completions.create(
            model="taught", messages=HELLO, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=most
        )
        assert got.usage is not None
        assert (got.usage.completion_tokens, got.choices[0].finish_reason) == (most, "length")
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    around = ask(server, [{"role": "user", "content": " a"}], tools=tools).usage.prompt_tokens - 1
    for room in (4, 1):
        message = {"role": "user", "content": " a" * (512 - around - room)}
        full = ask(server, [message], tools=tools, tool_choice="required")
        assert full.choices[0].finish_reason == "length"
        assert full.usage.total_tokens == 512
    wait_for(server.idle)


def test_a_call_that_is_cut_off_is_content(server: Running) -> None:
    client, whole = server.client(), ask(server, QUESTION, tools=TOOLS, logprobs=True, stop=["Oslo"])
    assert len(whole.choices[0].message.tool_calls) == 2  # stop texts end contents, not arguments
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    cut = client.chat.completions.create(model="taught", messages=QUESTION, tools=TOOLS, temperature=0, max_tokens=25)
    assert cut.choices[0].finish_reason == "length"
    assert (cut.choices[0].message.content or "").startswith('{"name": "get_weather", "arguments": {"city"')
    assert cut.choices[0].message.tool_calls is None


def test_a_client_leaves_within_a_schema(server: Running) -> None:
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 400}
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}
    stream = server.client().chat.completions.create(
        model="taught", messages=HELLO, response_format=form, max_tokens=490, stream=True
    )
    next(iter(stream))
    stream.close()
    wait_for(server.idle)
    assert ask(server, HELLO).choices[0].message.content == GREETING


def test_reasoning_can_be_asked_away(server: Running) -> None:
    for more in ({"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}):
        got = ask(server, QUESTION, tools=TOOLS, **more)
        assert getattr(got.choices[0].message, "reasoning_content", None) is None
    begun = ask(server, QUESTION, tools=TOOLS, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert begun.choices[0].message.reasoning_content == REASONING


def test_a_schema_is_kept(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Bergen"]}, "rain": {"type": "boolean"}, "n": {"type": "integer"}},
        "required": ["city", "rain"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema, "strict": True}}
    client = server.client()
    got = client.chat.completions.create(
        model="taught", messages=QUESTION, response_format=form, temperature=1.5, seed=1, n=3, max_tokens=200
    )
    for choice in got.choices:
        found = json.loads(choice.message.content or "")
        assert found["city"] in ("Oslo", "Bergen")
        assert type(found["rain"]) is bool
        assert set(found) <= {"city", "rain", "n"}
        assert choice.finish_reason == "stop"
    whole = ask(server, HELLO, response_format={"type": "json_object"})
    assert (whole.choices[0].message.content or "").lstrip().startswith("{")
    for schema in ({"type": "string", "pattern": "("}, {"not": {"type": "string"}}):
        bad: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match="the schema cannot be kept"):
            ask(server, HELLO, response_format=bad)
    with pytest.raises(openai.BadRequestError, match="response_format and tools"):
        ask(server, HELLO, response_format=form, tools=TOOLS)


def test_a_schema_and_an_imported_vocabulary(tmp_path: Any) -> None:
    from lumina.infer import load

    loaded = load(write_small_run(tmp_path / "small", num_layers=1, seq_length=512), precision="fp32")
    schema = {"type": "array", "items": {"enum": ["tree", "river"]}, "minItems": 2, "maxItems": 2}
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}
    with running(loaded) as small:
        got = small.client().chat.completions.create(
            model="small", messages=HELLO, response_format=form, temperature=1, seed=3, n=4, max_tokens=120
        )
        with pytest.raises(openai.BadRequestError) as refused:
            small.client().chat.completions.create(model="small", messages=HELLO, tools=TOOLS)
    for choice in got.choices:
        assert set(json.loads(choice.message.content or "")) <= {"tree", "river"}
    assert refused.value.param == "tools"


@needs_browser
def test_tools_are_declared_called_and_answered(server: Running, tmp_path: Path) -> None:
    """A model that was taught to call a tool: the calls are shown, their results are given, and all of it goes back to
    the server, whose answer to it the model knows by heart: with anything missing it would say something else."""
    last, done = (
        "[...document.querySelectorAll('article.assistant .body')].at(-1)",
        "!document.querySelector('[aria-busy]')",
    )
    with Browser(tmp_path) as browser:
        browser.open(server.address)
        browser.wait("document.getElementById('model').textContent === 'taught'")
        browser.click("#open-settings")
        browser.ask("document.getElementById('temperature').value = 0; document.getElementById('tools').value = '[{'")
        browser.press("Escape")
        browser.wait("document.getElementById('alert').textContent.includes('no JSON')")
        browser.ask(f"document.getElementById('tools').value = JSON.stringify([{WEATHER}.function])")
        browser.click("#open-settings")
        browser.press("Escape")
        browser.wait("document.getElementById('alert').hidden")
        browser.click("#input")
        browser.type(ASKED.content)
        browser.press("Enter")
        browser.wait(f"{done} && document.querySelectorAll('.call').length === 2")
        shown = browser.ask("[...document.querySelectorAll('.call code')].map((code) => code.textContent)")
        assert shown == [f"{call.name}({call.arguments})" for call in CALLS]
        assert browser.ask("document.querySelector('.reasoning > div').textContent") == REASONING
        # The first result has the focus already; the form is not sent while one is missing.
        browser.type("rain")
        browser.press("Enter")
        assert browser.ask("document.querySelectorAll('article').length") == 2
        assert browser.ask("document.activeElement === document.querySelectorAll('.results textarea')[1]")
        browser.type("sun")
        browser.press("Enter")
        browser.wait(f"{done} && {last}?.textContent === {ANSWER!r}")
        titles = browser.ask("[...document.querySelectorAll('article > h2')].map((title) => title.textContent)")
        assert titles == ["You", "Model", "Result of get_weather", "Result of get_weather", "Model"]
        assert browser.ask("document.querySelector('.results')") is None
        browser.click("button[aria-label='Make this answer again']")
        browser.wait(
            f"{done} && document.querySelectorAll('article').length === 5 && {last}.textContent === {ANSWER!r}"
        )
        assert browser.complaints == []
