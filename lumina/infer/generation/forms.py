"""Forms of answers: how tool calls and reasoning begin, in whatever form a model's template writes them.

The form is read off the template itself: the same conversation is rendered with answers that call one tool or another,
with one argument or another, and what all of them begin with is the opening of a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lumina.chat import ChatTokenizer, Conversation, Message, ToolCall
from lumina.config import UserError

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
    """The special token that begins a call: without it none is made. Empty when the template has no tools, or writes
    calls without a token of their own."""
    call = Message("assistant", "", tool_calls=(ToolCall("f", "{}", "call_0"),))
    return _own_token(tokenizer, call, thinking=None)


def reasoning_tokens(tokenizer: ChatTokenizer) -> frozenset[int]:
    """The special token that begins reasoning, in an answer to a prompt that asks for none. Empty when the template has
    none, or says in the prompt that there is to be none."""
    return _own_token(tokenizer, Message("assistant", "a", reasoning="b"), thinking=False)


def _own_token(tokenizer: ChatTokenizer, answer: Message, thinking: bool | None) -> frozenset[int]:
    """The first special token of an answer that a plain answer does not have."""
    conversation = Conversation([Message("user", "a")])
    try:
        prompt = tokenizer.prompt_ids(conversation, thinking)
        plain = _answer(tokenizer, conversation, prompt, Message("assistant", "a"))
        said = _answer(tokenizer, conversation, prompt, answer)
    except UserError:
        return frozenset()
    return frozenset([token for token in said if tokenizer.is_special(token) and token not in plain][:1])


def _answer(tokenizer: ChatTokenizer, conversation: Conversation, prompt: Sequence[int], answer: Message) -> list[int]:
    """The tokens that an answer adds to the prompt. Raises UserError."""
    whole = Conversation([*conversation.messages, answer], tools=conversation.tools)
    ids, _ = tokenizer.message_spans(whole)[-1]
    if ids[: len(prompt)] != list(prompt):
        raise _no_opening()
    return ids[len(prompt) :]


def _no_opening() -> UserError:
    return UserError("this model's template has no fixed opening of a tool call that an answer could be begun with")
