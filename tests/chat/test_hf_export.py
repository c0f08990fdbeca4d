"""The exported Jinja template says what `render` does, by jinja2 alone, set up as transformers sets it up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lumina.chat import Conversation, Message, Tokenizer, ToolCall, json_text, render
from lumina.chat.hf_export import chat_template, tokenizer_config
from tests.chat.drawn import RESULTS, as_openai, conversations, with_arguments_written_anew, with_calls

TOKENIZERS = {name: Tokenizer.load(name) for name in ("im-roles-1", "im-roles-2")}


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def rendered(name: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(chat_template(name)).render(messages=messages, **variables)


@given(conversations, st.booleans(), st.sampled_from(["reasoning", "reasoning_content"]), st.booleans())
def test_it_is_what_is_rendered(conversation: Conversation, parsed: bool, thinks: str, thinking: bool) -> None:
    """Arguments and tools as JSON texts or as objects, which `json_text` writes."""
    conversation = with_arguments_written_anew(conversation) if parsed else conversation
    tokenizer = TOKENIZERS["im-roles-2"]
    messages = [as_openai(message, parsed, thinks) for message in conversation.messages]
    tools = [json.loads(tool) if parsed else tool for tool in conversation.tools] or None
    assert rendered("im-roles-2", messages, tools=tools) == tokenizer.decode(render(tokenizer, conversation).ids)
    opened = rendered("im-roles-2", messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking)
    assert opened == tokenizer.decode(tokenizer.prompt_ids(conversation, thinking=thinking))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_messages_roles_and_results(name: str) -> None:
    chat = [("system", "s"), ("human", "q"), ("bot", "a"), ("tool", "r")]
    roles = {"human": "user", "bot": "assistant"}
    conversation = Conversation([Message(roles.get(role, role), text) for role, text in chat])
    messages = [{"role": role, "content": text} for role, text in chat]
    ids = render(TOKENIZERS[name], conversation).ids
    assert rendered(name, messages) == TOKENIZERS[name].decode(ids)
    with pytest.raises(TemplateError, match="unknown role: critic"):
        rendered(name, [{"role": "critic", "content": "x"}])


def test_parts_of_text_and_flat_calls() -> None:
    """Content in parts, and calls without the `function` around them."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "assistant", "content": parts, "tool_calls": [{"name": "f", "arguments": {"x": "é"}}]}
    expected = Conversation([Message("assistant", "ab", tool_calls=(ToolCall("f", '{"x": "é"}'),))])
    tokenizer = TOKENIZERS["im-roles-2"]
    assert rendered("im-roles-2", [message]) == tokenizer.decode(render(tokenizer, expected).ids)


@pytest.mark.parametrize("which", RESULTS)
def test_results_bear_the_names_of_their_tools(which: str) -> None:
    conversation, tokenizer = with_calls(RESULTS[which][0]), TOKENIZERS["im-roles-2"]
    messages = [as_openai(message, False, "reasoning") for message in conversation.messages]
    assert rendered("im-roles-2", messages) == tokenizer.decode(render(tokenizer, conversation).ids)


@pytest.mark.parametrize("given", [{}, {"arguments": ""}, {"arguments": None}, {"arguments": "{}"}, {"arguments": {}}])
def test_a_call_without_arguments(given: dict[str, Any]) -> None:
    """As training and serving read it."""
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", **given}}]}
    tokenizer = TOKENIZERS["im-roles-2"]
    expected = Conversation([Message("assistant", "", tool_calls=(ToolCall("f", "{}"),))])
    assert rendered("im-roles-2", [message]) == tokenizer.decode(render(tokenizer, expected).ids)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "user", "content": "q", "tool_calls": [{"name": "f", "arguments": {}}]}, "not the assistant's"),
        ({"role": "tool", "content": "r", "reasoning_content": "why"}, "not the assistant's"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "only parts of text"),
    ],
)
def test_what_has_no_form_is_refused(message: dict[str, Any], why: str) -> None:
    with pytest.raises(TemplateError, match=why):
        rendered("im-roles-2", [message])


def test_tools_before_any_message() -> None:
    tokenizer, tool = TOKENIZERS["im-roles-2"], {"type": "function", "function": {"name": "f"}}
    said = rendered("im-roles-2", [], tools=[tool], add_generation_prompt=True)
    assert said == tokenizer.decode(tokenizer.prompt_ids(Conversation([], tools=(json_text(tool),))))


def test_each_template_has_its_fingerprint() -> None:
    found = {name: tokenizer_config(tokenizer, 64)["lumina_fingerprint"] for name, tokenizer in TOKENIZERS.items()}
    assert found == {name: tokenizer.fingerprint for name, tokenizer in TOKENIZERS.items()}
    assert len(set(found.values())) == 2
