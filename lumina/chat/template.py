"""Lumina's chat template: the only place that knows how turns become tokens.

    <|im_start|><|role|>CONTENT<|im_end|>        a message; nothing stands between messages
    <|endoftext|>TEXT<|endoftext|>               a plain text for continued pretraining (role "text")

That is all of `im-roles-1`. `im-roles-2` renders such conversations alike, and has a form for tools, tool calls, their
results and reasoning (agent_parts.py; docs/chat-template.md has examples).

Training, inference and export all go through here, so what the model is asked is what it was taught. What is supervised
is conversation.py's to say. An imported model brings a tokenizer and a template of its own (lumina.chat.hf).

Shapes: T tokens, M messages, N conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat.agent_parts import has_parts, misplaced_part, render_parts
from lumina.chat.cl100k import FIRST_SPECIAL_TOKENS, SPECIAL_TOKENS, Cl100kEncoder
from lumina.chat.conversation import (
    ROLES,
    TEXT_ROLE,
    TOOL_ROLE,
    Conversation,
    Message,
    MessageColumns,
    are_supervised,
    loss_mask,
    message_columns,
)
from lumina.chat.masked_spans import mask_spans
from lumina.chat.protocol import RenderedBlock
from lumina.config import UserError

FIRST_TEMPLATE, NEWEST_TEMPLATE = "im-roles-1", "im-roles-2"
# Name -> special tokens. The name is part of every data fingerprint and stands in every checkpoint: a new layout gets a
# new one. Version 0.2.0 and earlier recorded none, and had the first.
TEMPLATES = {FIRST_TEMPLATE: FIRST_SPECIAL_TOKENS, NEWEST_TEMPLATE: SPECIAL_TOKENS}

_ROLE_INDEX = {role: i for i, role in enumerate(ROLES)}
_REMEDY = f"{NEWEST_TEMPLATE} has one: set chat_template for a new run"


class Rendered(NamedTuple):
    """ids_T int32; mask_T uint8, 1 where the token is supervised; message_offsets int64[M+1]."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    message_offsets: NDArray[np.int64]


def render_valid(encoder: Cl100kEncoder, conversations: Sequence[Conversation]) -> tuple[RenderedBlock, dict[int, str]]:
    """The conversations that the template has a form for, tokenized, and why it has none for the others, by number.

    Raises:
        KeyError: a role that is not one of ROLES (sources map the aliases before).
    """
    messages = [message for conversation in conversations for message in conversation.messages]
    columns = message_columns(messages)
    role_M = np.fromiter(map(_ROLE_INDEX.__getitem__, columns.role), dtype=np.int64, count=len(messages))
    plain = columns.content_alone and not (has_parts(encoder) and TOOL_ROLE in columns.role)
    if plain and not any(conversation.tools for conversation in conversations):
        return _render_plain(encoder, conversations, messages, columns, role_M), {}
    refused = {i: reason for i, one in enumerate(conversations) if (reason := _objection(encoder, one))}
    kept = [i for i in range(len(conversations)) if i not in refused]
    chosen = [conversations[i] for i in kept]
    block = render_parts(encoder, chosen) if has_parts(encoder) else render_valid(encoder, chosen)[0]
    return block._replace(source=np.array(kept, dtype=np.int64)), refused


def _objection(encoder: Cl100kEncoder, conversation: Conversation) -> str:
    """Why the template has no form for a conversation; empty where it has one."""
    if has_parts(encoder):
        return misplaced_part(conversation)
    found = "tools" if conversation.tools else ""
    for message in conversation.messages:
        found = found or (message.tool_calls and "tool calls") or (message.reasoning and "reasoning") or ""
    return f"{found}: the chat template {FIRST_TEMPLATE} has no form for them ({_REMEDY})" if found else ""


def _render_plain(
    encoder: Cl100kEncoder,
    conversations: Sequence[Conversation],
    messages: Sequence[Message],
    columns: MessageColumns,
    role_M: NDArray[np.int64],
) -> RenderedBlock:
    """Conversations of messages with nothing but a content, in a few array operations: per-message Python would cost
    more than the tokenizer."""
    count = len(messages)
    supervised_M = are_supervised(role_M, columns.supervise)
    content_ids, lengths_M = encoder.encode_many(columns.content)

    special = encoder.special_ids
    end_of_text = special["<|endoftext|>"]
    starts = np.array([special["<|im_start|>"]] * 4 + [end_of_text], dtype=np.int32)
    # The first template has no token for tools' results: there they are what the user says.
    roles = np.array([special.get(f"<|{role}|>", special["<|user|>"]) for role in ROLES[:4]] + [0], dtype=np.int32)
    stops = np.array([special["<|im_end|>"]] * 4 + [end_of_text], dtype=np.int32)

    has_role_M = role_M != _ROLE_INDEX[TEXT_ROLE]
    head_M = 1 + has_role_M.astype(np.int64)
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(head_M + lengths_M + 1, out=offsets[1:])
    first_M = offsets[:-1]

    ids_T = np.empty(int(offsets[-1]), dtype=np.int32)
    ids_T[first_M] = starts[role_M]
    second = first_M[has_role_M] + 1
    ids_T[second] = roles[role_M[has_role_M]]
    # Token j of message m's content goes to first_M[m] + head_M[m] + j.
    shift_M = first_M + head_M - (np.cumsum(lengths_M) - lengths_M)
    ids_T[np.repeat(shift_M, lengths_M) + np.arange(content_ids.size)] = content_ids
    ids_T[offsets[1:] - 1] = stops[role_M]

    mask_T = loss_mask(supervised_M, first_M + head_M, offsets[1:], len(ids_T))
    if any(columns.masked):
        places = zip(messages, (first_M + head_M).tolist(), lengths_M.tolist(), strict=True)
        mask_spans(encoder, ids_T, mask_T, places)

    conversation_offsets = np.zeros(len(conversations) + 1, dtype=np.int64)
    np.cumsum([len(conversation.messages) for conversation in conversations], out=conversation_offsets[1:])
    source_N, repeated_M = np.arange(len(conversations), dtype=np.int64), np.zeros(count, dtype=np.bool_)
    return RenderedBlock(
        ids_T, mask_T, offsets, conversation_offsets, supervised_M, head_M, source_N, repeated_M, role_M.astype(np.int8)
    )


def render_many(encoder: Cl100kEncoder, conversations: Sequence[Conversation]) -> RenderedBlock:
    """All of these conversations. Raises UserError: the template has no form for one of them."""
    block, refused = render_valid(encoder, conversations)
    for reason in refused.values():
        raise UserError(f"the conversation cannot be rendered: {reason}")
    return block


def render(encoder: Cl100kEncoder, conversation: Conversation) -> Rendered:
    """One conversation's ids, mask and message offsets. Raises UserError: the template has no form for it."""
    block = render_many(encoder, [conversation])
    return Rendered(block.ids, block.mask, block.message_offsets)


def prompt_ids(encoder: Cl100kEncoder, conversation: Conversation, thinking: bool | None = None) -> list[int]:
    """The ids to generate from: the conversation so far and the opening of the assistant's message, with that of its
    reasoning where `thinking`. A prefix of `render` of the same conversation with the answer appended. Raises
    UserError: the template has no form for it."""
    answered = Conversation([*conversation.messages, Message("assistant", "")], tools=conversation.tools)
    ids = render(encoder, answered).ids.tolist()[:-1]
    return [*ids, encoder.special_ids["<|reasoning|>"]] if thinking and has_parts(encoder) else ids
