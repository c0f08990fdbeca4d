"""Other real clients in front of the server: litellm (the extra `clients`) and langchain's class for OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.infer.serve.running_server import Running, running, wait_for
from tests.infer.taught_models import ANSWER, ASKED, CALLS, REASONING, WEATHER, taught

TOOLS: list[Any] = [json.loads(WEATHER)]
QUESTION: list[Any] = [{"role": "user", "content": ASKED.content}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(taught(tmp_path_factory.mktemp("runs") / "taught")) as started:
        yield started


def test_litellm(server: Running) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed: the extra `clients`")
    where = {"model": "openai/taught", "api_base": f"{server.address}/v1", "api_key": "none", "temperature": 0}

    def ask(messages: list[Any], **more: Any) -> Any:
        return litellm.completion(messages=messages, tools=TOOLS, max_tokens=100, **where, **more)

    first = ask(QUESTION).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.reasoning_content == REASONING
    assert [call.function.arguments for call in first.message.tool_calls] == [call.arguments for call in CALLS]
    results = [
        {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": text}
        for call, text in zip(first.message.tool_calls, ("rain", "sun"), strict=True)
    ]
    assert ask([*QUESTION, first.message.model_dump(), *results]).choices[0].message.content == ANSWER
    chunks = list(ask(QUESTION, stream=True))
    whole = litellm.stream_chunk_builder(chunks, messages=QUESTION).choices[0].message
    assert [call.function.arguments for call in whole.tool_calls] == [call.arguments for call in CALLS]
    assert whole.reasoning_content == REASONING
    stream = ask(QUESTION, stream=True)
    next(iter(stream))
    stream.completion_stream.close()
    wait_for(server.idle)


def test_langchain(server: Running) -> None:
    openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed: the extra `dev`")
    from langchain_core.messages import HumanMessage, ToolMessage

    plain = openai.ChatOpenAI(
        model="taught", base_url=f"{server.address}/v1", api_key="none", temperature=0, max_tokens=100, max_retries=0
    )
    model = plain.bind_tools(TOOLS)
    question = HumanMessage(ASKED.content)
    first = model.invoke([question])
    wanted = [(call.name, json.loads(call.arguments)) for call in CALLS]
    assert [(call["name"], call["args"]) for call in first.tool_calls] == wanted
    results = [
        ToolMessage(text, tool_call_id=call["id"]) for call, text in zip(first.tool_calls, ("rain", "sun"), strict=True)
    ]
    # It does not send the reasoning back, so that the model is asked something that it was not taught word for word.
    assert model.invoke([question, first, *results]).content.startswith(ANSWER.partition(",")[0])
    streamed = None
    for chunk in model.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [(call["name"], call["args"]) for call in streamed.tool_calls] == wanted
    stream = model.stream([question])
    next(stream)
    stream.close()
    wait_for(server.idle)
    schema = {"title": "city", "type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    schema |= {"additionalProperties": False}
    held = plain.with_structured_output(schema, method="json_schema")
    assert held.invoke([question]) == {"city": "Oslo"}
