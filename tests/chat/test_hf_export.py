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
from tests.chat.drawn import conversations

TOKENIZERS = {name: Tokenizer.load(name) for name in ("im-roles-1", "im-roles-2")}


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def rendered(name: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(chat_template(name)).render(messages=messages, **variables)


def as_openai(message: Message, parsed: bool, thinks: str) -> dict[str, Any]:
    """A message as OpenAI's API has it; `parsed`: arguments as objects."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        found[thinks] = message.reasoning
    if message.tool_calls:
        found["content"] = message.content or None
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments) if parsed else call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        found |= {"tool_call_id": message.call_id, **({"name": message.name} if message.name else {})}
    return found


@given(conversations, st.booleans(), st.sampled_from(["reasoning", "reasoning_content"]), st.booleans())
def test_it_is_what_is_rendered(conversation: Conversation, parsed: bool, thinks: str, thinking: bool) -> None:
    """Arguments and tools as JSON texts or as objects, which `json_text` writes."""
    if parsed:
        conversation.messages = [
            message._replace(
                tool_calls=tuple(
                    call._replace(arguments=json_text(json.loads(call.arguments))) for call in message.tool_calls
                )
            )
            for message in conversation.messages
        ]
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


def test_tools_before_any_message() -> None:
    tokenizer, tool = TOKENIZERS["im-roles-2"], {"type": "function", "function": {"name": "f"}}
    said = rendered("im-roles-2", [], tools=[tool], add_generation_prompt=True)
    assert said == tokenizer.decode(tokenizer.prompt_ids(Conversation([], tools=(json_text(tool),))))


def test_each_template_has_its_fingerprint() -> None:
    found = {name: tokenizer_config(tokenizer, 64)["lumina_fingerprint"] for name, tokenizer in TOKENIZERS.items()}
    assert found == {name: tokenizer.fingerprint for name, tokenizer in TOKENIZERS.items()}
    assert len(set(found.values())) == 2
