"""Lumina's chat template: the only place that knows how turns become tokens.

    <|im_start|><|role|>CONTENT<|im_end|>        a message; nothing stands between messages
    <|endoftext|>TEXT<|endoftext|>               a plain text for continued pretraining (role "text")

Training, inference and export all go through here, so what the model is asked is what it was taught. What is supervised
is conversation.py's to say. An imported model brings a tokenizer and a template of its own (hf/).

Shapes: T tokens, M messages, N conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat.cl100k import Cl100kEncoder
from lumina.chat.conversation import ROLES, TEXT_ROLE, Conversation, Message, is_supervised, loss_mask
from lumina.chat.protocol import RenderedBlock

TEMPLATE_VERSION = "im-roles-1"  # part of every data fingerprint: change it with the layout

_ROLE_INDEX = {role: i for i, role in enumerate(ROLES)}


class Rendered(NamedTuple):
    """ids_T int32; mask_T uint8, 1 where the token is supervised; message_offsets int64[M+1]."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    message_offsets: NDArray[np.int64]


def render_many(tokenizer: Cl100kEncoder, conversations: Sequence[Conversation]) -> RenderedBlock:
    """Renders conversations in a few array operations: per-message Python would cost more than the tokenizer.

    Raises:
        KeyError: a role that is not one of user, assistant, system, text (sources map the aliases before).
    """
    messages = [message for conversation in conversations for message in conversation.messages]
    count = len(messages)
    content_ids, lengths_M = tokenizer.encode_many([message.content for message in messages])
    role_M = np.fromiter((_ROLE_INDEX[message.role] for message in messages), dtype=np.int64, count=count)
    supervised_M = np.fromiter(map(is_supervised, messages), dtype=np.bool_, count=count)

    special = tokenizer.special_ids
    end_of_text = special["<|endoftext|>"]
    starts = np.array([special["<|im_start|>"]] * 3 + [end_of_text], dtype=np.int32)
    roles = np.array([special[f"<|{role}|>"] for role in ROLES[:3]] + [0], dtype=np.int32)
    stops = np.array([special["<|im_end|>"]] * 3 + [end_of_text], dtype=np.int32)

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
    for number, message in enumerate(messages):
        if message.masked:
            start = int(first_M[number] + head_M[number])
            own = slice(start, start + int(lengths_M[number]))
            mask_T[own] &= ~masked_tokens(tokenizer, ids_T[own], message)

    conversation_offsets = np.zeros(len(conversations) + 1, dtype=np.int64)
    np.cumsum([len(conversation.messages) for conversation in conversations], out=conversation_offsets[1:])
    source_N, repeated_M = np.arange(len(conversations), dtype=np.int64), np.zeros(count, dtype=np.bool_)
    return RenderedBlock(
        ids_T, mask_T, offsets, conversation_offsets, supervised_M, head_M, source_N, repeated_M, role_M.astype(np.int8)
    )


def masked_tokens(tokenizer: Cl100kEncoder, ids_T: NDArray[np.int32], message: Message) -> NDArray[np.bool_]:
    """Which tokens of a message's content (T) have a byte in one of its masked spans."""
    end_T = np.cumsum([len(tokenizer.token_bytes(token)) for token in ids_T.tolist()])
    start_T = np.concatenate([[0], end_T[:-1]])
    found_T = np.zeros(len(ids_T), dtype=np.bool_)
    for first, last in message.masked:
        begin, end = (len(message.content[:at].encode()) for at in (first, last))
        found_T |= (start_T < end) & (end_T > begin)
    return found_T


def render(tokenizer: Cl100kEncoder, conversation: Conversation) -> Rendered:
    """One conversation's ids, mask and message offsets."""
    block = render_many(tokenizer, [conversation])
    return Rendered(block.ids, block.mask, block.message_offsets)


def prompt_ids(tokenizer: Cl100kEncoder, conversation: Conversation) -> list[int]:
    """The ids to generate from: the conversation so far and the opening of the assistant's message. A prefix of
    `render` of the same conversation with the answer appended."""
    special = tokenizer.special_ids
    opening = [special["<|im_start|>"], special["<|assistant|>"]]
    return [*render(tokenizer, conversation).ids.tolist(), *opening]
