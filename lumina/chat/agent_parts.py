"""Tools, tool calls, their results and reasoning in Lumina's chat template (im-roles-2).

    <|im_start|><|system|>CONTENT<|tool_def|>TOOL<|tool_def|>TOOL<|im_end|>                the tools, each as JSON
    <|im_start|><|assistant|><|reasoning|>REASONING<|reasoning_end|>CONTENT
        <|tool_call|>{"name": …, "arguments": …}<|tool_call_end|><|im_end|>                 calls one after another
    <|im_start|><|tool|>NAME<|tool_result|>RESULT<|im_end|>                                 a tool's result

Tools stand at the end of the system message that opens the conversation, or in a system block of their own before the
first message, whose head they then belong to. A result bears the name of its tool: its own, else that of the call whose
id it has, else, the results of one message's calls being in their order, that of the call whose turn it is. What is not
there is left out, so that a message with nothing but a content has the form that it always had.

Shapes: T tokens, M messages, I items (a special token, or a text), N conversations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lumina.chat.cl100k import Cl100kEncoder
from lumina.chat.conversation import ROLES, TEXT_ROLE, TOOL_ROLE, Conversation, Message, is_supervised, loss_mask
from lumina.chat.masked_spans import mask_spans
from lumina.chat.protocol import RenderedBlock
from lumina.chat.tool_calls import call_text, is_readable

_TEXT = -1  # an item that is a text; the others are special tokens


def has_parts(encoder: Cl100kEncoder) -> bool:
    """Whether the vocabulary has the special tokens of these forms."""
    return "<|tool_call|>" in encoder.special_ids


def misplaced_part(conversation: Conversation) -> str:
    """Why a conversation has no form; empty where it has one."""
    for message in conversation.messages:
        if (message.reasoning or message.tool_calls) and message.role != "assistant":
            return "reasoning or tool calls in a message that is not the assistant's"
        if not all(map(is_readable, message.tool_calls)):
            return "a tool call without a name, or with arguments that are no JSON object"
    return ""


def render_parts(encoder: Cl100kEncoder, conversations: Sequence[Conversation]) -> RenderedBlock:
    """Conversations of any messages whose parts are in their places (`misplaced_part`)."""
    layout = _Layout(encoder.special_ids)
    for conversation in conversations:
        layout.add(conversation)
    text_ids, lengths = encoder.encode_many(layout.texts)
    item_I = np.array(layout.items, dtype=np.int32)
    is_text_I = item_I == _TEXT
    size_I = np.ones(len(item_I), dtype=np.int64)
    size_I[is_text_I] = lengths
    at_I = np.zeros(len(item_I) + 1, dtype=np.int64)
    np.cumsum(size_I, out=at_I[1:])
    ids_T = np.repeat(item_I, size_I)
    ids_T[np.repeat(is_text_I, size_I)] = text_ids

    offsets, body_M = at_I[layout.ends], at_I[layout.bodies]
    messages = [message for conversation in conversations for message in conversation.messages]
    supervised_M = np.fromiter(map(is_supervised, messages), dtype=np.bool_, count=len(messages))
    mask_T = loss_mask(supervised_M, body_M, offsets[1:], len(ids_T))
    content_M, tokens_M = at_I[layout.contents], size_I[layout.contents]
    mask_spans(encoder, ids_T, mask_T, zip(messages, content_M.tolist(), tokens_M.tolist(), strict=True))

    conversation_offsets = np.zeros(len(conversations) + 1, dtype=np.int64)
    np.cumsum([len(conversation.messages) for conversation in conversations], out=conversation_offsets[1:])
    return RenderedBlock(
        ids_T,
        mask_T,
        offsets,
        conversation_offsets,
        supervised_M,
        body_M - offsets[:-1],
        np.arange(len(conversations), dtype=np.int64),
        np.zeros(len(messages), dtype=np.bool_),
        np.array([ROLES.index(message.role) for message in messages], dtype=np.int8),
    )


class _Called:
    """Which tools were called so far: what a result is the result of."""

    def __init__(self) -> None:
        self._by_id = dict[str, str]()
        self._in_order = list[str]()  # of the last message with calls, those that have no result yet

    def add(self, message: Message) -> None:
        if message.tool_calls:
            self._by_id |= {call.id: call.name for call in message.tool_calls if call.id}
            self._in_order = [call.name for call in message.tool_calls]
        elif message.role == TOOL_ROLE:
            del self._in_order[:1]

    def name_of(self, result: Message) -> str:
        """The name of the tool; empty where nothing tells."""
        return result.name or self._by_id.get(result.call_id) or next(iter(self._in_order), "")


class _Layout:
    """What conversations come to before their texts are tokenized: items, and where messages are among them.

    ends (M+1): the item after each message, from 0; bodies (M): the first that the role says; contents (M).
    """

    def __init__(self, special_ids: dict[str, int]) -> None:
        self._special = special_ids
        self.items: list[int] = []
        self.texts: list[str] = []
        self._ends: list[int] = [0]
        self._bodies: list[int] = []
        self._contents: list[int] = []

    @property
    def ends(self) -> NDArray[np.int64]:
        return np.array(self._ends, dtype=np.int64)

    @property
    def bodies(self) -> NDArray[np.int64]:
        return np.array(self._bodies, dtype=np.int64)

    @property
    def contents(self) -> NDArray[np.int64]:
        return np.array(self._contents, dtype=np.int64)

    def add(self, conversation: Conversation) -> None:
        tools, called = conversation.tools, _Called()
        if tools and conversation.messages and conversation.messages[0].role != "system":
            self._token("<|im_start|>", "<|system|>")
            self._tools(tools)
            self._token("<|im_end|>")
            tools = ()
        for number, message in enumerate(conversation.messages):
            self._message(message, () if number else tools, called)
            called.add(message)

    def _message(self, message: Message, tools: Sequence[str], called: _Called) -> None:
        if message.role == TEXT_ROLE:
            self._token("<|endoftext|>")
        else:
            self._token("<|im_start|>", f"<|{message.role}|>")
        if message.role == TOOL_ROLE:
            self._text(called.name_of(message))
            self._token("<|tool_result|>")
        self._bodies.append(len(self.items))
        if message.reasoning:
            self._token("<|reasoning|>")
            self._text(message.reasoning)
            self._token("<|reasoning_end|>")
        self._contents.append(len(self.items))
        self._text(message.content)
        self._tools(tools)
        for call in message.tool_calls:
            self._token("<|tool_call|>")
            self._text(call_text(call))
            self._token("<|tool_call_end|>")
        self._token("<|endoftext|>" if message.role == TEXT_ROLE else "<|im_end|>")
        self._ends.append(len(self.items))

    def _tools(self, tools: Sequence[str]) -> None:
        for tool in tools:
            self._token("<|tool_def|>")
            self._text(tool)

    def _token(self, *names: str) -> None:
        self.items += [self._special[name] for name in names]

    def _text(self, text: str) -> None:
        self.items.append(_TEXT)
        self.texts.append(text)
