"""Forms of answers: how tool calls and reasoning begin, in whatever form a model's template writes them.

The form is read off the template itself: the same conversation is rendered with answers that call one tool or another,
with one argument or another, and what all of them begin with is the opening of a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lumina.chat import ChatTokenizer, Conversation, Message, ToolCall
from lumina.config import UserError
from lumina.infer.generation.constraint import CallTokens

_ARGUMENTS = ("{}", '{"a": 1}', '{"b": [true]}', '{"Q": "r"}')


def call_opening(
    tokenizer: ChatTokenizer, conversation: Conversation, prompt: Sequence[int], names: Sequence[str]
) -> list[int]:
    """The tokens after `prompt` (the conversation's ids) that begin every call of the tools of these names: of one
    tool, its name with them. Raises UserError: the template has no such opening."""
    answers = [
        _answer(tokenizer, conversation, prompt, Message("assistant", "", tool_calls=(ToolCall(name, text, "call_0"),)))
        for name in names
        for text in _ARGUMENTS
    ]
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*answers, strict=False))
    opening = [tokens[0] for tokens in alike]
    reader = tokenizer.answer_reader(prompt)
    said = [reader.push(token) for token in opening]
    if not opening or any(delta.content.strip() or delta.reasoning.strip() for delta in said):
        raise _no_opening()
    return opening


def calling_tokens(tokenizer: ChatTokenizer) -> frozenset[int]:
    """The token of the template's own that begins a call: without it none is made. Empty when the template has no
    tools, or writes calls without a token of their own."""
    call = Message("assistant", "", tool_calls=(ToolCall("f", "{}", "call_0"),))
    return _own_token(tokenizer, call, thinking=None)


def call_tokens(tokenizer: ChatTokenizer) -> CallTokens | None:
    """How the template writes a call, where it does so between two tokens of its own and as one object of JSON."""
    call = ToolCall("f", '{"a": 1}', "call_0")
    conversation = Conversation([Message("user", "a")])
    try:
        prompt = tokenizer.prompt_ids(conversation)
        said = _answer(tokenizer, conversation, prompt, Message("assistant", "", tool_calls=(call,)))
    except UserError:
        return None
    places = [at for at, token in enumerate(said) if token in calling_tokens(tokenizer)]
    ends = [at for at, token in enumerate(said) if places and at > places[0] and _templates_own(tokenizer, token)]
    if not ends or said[ends[0]] in tokenizer.stop_ids:
        return None
    text = tokenizer.decode(said[places[0] + 1 : ends[0]])
    before, found, after = text.partition(f'{{"name": "{call.name}", "arguments": {call.arguments}}}')
    return CallTokens(said[places[0]], said[ends[0]], before, after) if found else None


def reasoning_tokens(tokenizer: ChatTokenizer) -> frozenset[int]:
    """The token of the template's own that begins reasoning, in answers to prompts that ask for none. Empty when the
    template has none, or says in the prompt that there is to be none."""
    return _own_token(tokenizer, Message("assistant", "a", reasoning="b"), thinking=False)


def _own_token(tokenizer: ChatTokenizer, answer: Message, thinking: bool | None) -> frozenset[int]:
    """The first token of the template's own in an answer that a plain answer does not have."""
    conversation = Conversation([Message("user", "a")])
    try:
        prompt = tokenizer.prompt_ids(conversation, thinking)
        plain = _answer(tokenizer, conversation, prompt, Message("assistant", "a"))
        said = _answer(tokenizer, conversation, prompt, answer)
    except UserError:
        return frozenset()
    return frozenset([token for token in said if token not in plain and _templates_own(tokenizer, token)][:1])


def _templates_own(tokenizer: ChatTokenizer, token: int) -> bool:
    """Whether only the template writes the token: a special one, or one of those that vocabularies add for it (Qwen3's
    `<tool_call>`), which no text becomes."""
    return tokenizer.is_special(token) or token not in tokenizer.encode(tokenizer.decode([token]))


def _answer(tokenizer: ChatTokenizer, conversation: Conversation, prompt: Sequence[int], answer: Message) -> list[int]:
    """The tokens that an answer adds to the prompt. Raises UserError."""
    whole = Conversation([*conversation.messages, answer], tools=conversation.tools)
    ids, _ = tokenizer.message_spans(whole)[-1]
    if ids[: len(prompt)] != list(prompt):
        raise _no_opening()
    return ids[len(prompt) :]


def _no_opening() -> UserError:
    return UserError("this model's template has no fixed opening of a tool call that an answer could be begun with")
