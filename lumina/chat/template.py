"""The chat template: the only place that knows how turns become tokens and which of them are learned.

    <|im_start|><|role|>CONTENT<|im_end|>        a message; nothing stands between messages
    <|endoftext|>TEXT<|endoftext|>               a plain text for continued pretraining (role "text")

Learned ("supervised") are an assistant's CONTENT and its <|im_end|>, and a plain text with its closing <|endoftext|>.
Training, inference and export all go through here, so what the model is asked is what it was taught. An imported model
brings a tokenizer and a template of its own (foreign.py): `open_tokenizer` opens either, and rooms ask both alike.

Shapes: T tokens, M messages, N conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lumina.chat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lumina.chat.hf_tokenizer import ForeignTokenizer

AnyTokenizer: TypeAlias = "Tokenizer | ForeignTokenizer"

TEMPLATE_VERSION = "im-roles-1"  # part of every data fingerprint: change it with the layout

ROLE_ALIASES = {
    "user": "user",
    "prompter": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "system": "system",
}
TEXT_ROLE = "text"
_ROLES = ("user", "assistant", "system", TEXT_ROLE)
_ROLE_INDEX = {role: i for i, role in enumerate(_ROLES)}
_LEARNED_ROLES = ("assistant", TEXT_ROLE)


class Message(NamedTuple):
    """One turn. `role` is user, assistant, system or text; `learn` False masks an assistant turn as context, `masked`
    spans [start, end) of its characters."""

    role: str
    content: str
    learn: bool = True
    masked: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Conversation:
    """Turns in order; `id` groups what must stay on one side of a split, `origin` says where it was read."""

    messages: Sequence[Message]
    id: str = ""
    origin: str = ""


class Rendered(NamedTuple):
    """ids_T int32; mask_T uint8, 1 where the token is learned as a target; message_offsets int64[M+1]."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    message_offsets: NDArray[np.int64]


class RenderedBlock(NamedTuple):
    """N conversations one after another.

    ids_T int32, mask_T uint8, message_offsets int64[M+1] into T, conversation_offsets int64[N+1] into M,
    learned_M bool (the message has learned tokens), head_M int64 (control tokens before its content).
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    message_offsets: NDArray[np.int64]
    conversation_offsets: NDArray[np.int64]
    learned: NDArray[np.bool_]
    head: NDArray[np.int64]


def render_many(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> RenderedBlock:
    """Renders conversations in a few array operations: per-message Python would cost more than the tokenizer.

    Raises:
        KeyError: a role that is not one of user, assistant, system, text (sources map the aliases before).
    """
    messages = [message for conversation in conversations for message in conversation.messages]
    count = len(messages)
    content_ids, lengths_M = tokenizer.encode_many([message.content for message in messages])
    role_M = np.fromiter((_ROLE_INDEX[message.role] for message in messages), dtype=np.int64, count=count)
    learn_M = np.fromiter((message.learn for message in messages), dtype=np.bool_, count=count)

    control = tokenizer.control_ids
    end_of_text = control["<|endoftext|>"]
    starts = np.array([control["<|im_start|>"]] * 3 + [end_of_text], dtype=np.int32)
    roles = np.array([control[f"<|{role}|>"] for role in _ROLES[:3]] + [0], dtype=np.int32)
    stops = np.array([control["<|im_end|>"]] * 3 + [end_of_text], dtype=np.int32)

    has_role_M = role_M != _ROLE_INDEX[TEXT_ROLE]
    head_M = 1 + has_role_M.astype(np.int64)
    learned_M = np.isin(role_M, [_ROLE_INDEX[role] for role in _LEARNED_ROLES]) & learn_M
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

    mask_T = np.repeat(learned_M.astype(np.uint8), np.diff(offsets))
    mask_T[first_M] = 0
    mask_T[second] = 0

    for number, message in enumerate(messages):
        if message.masked:
            start = int(first_M[number] + head_M[number])
            own = slice(start, start + int(lengths_M[number]))
            mask_T[own] &= ~masked_tokens(tokenizer, ids_T[own], message)

    conversation_offsets = np.zeros(len(conversations) + 1, dtype=np.int64)
    np.cumsum([len(conversation.messages) for conversation in conversations], out=conversation_offsets[1:])
    return RenderedBlock(ids_T, mask_T, offsets, conversation_offsets, learned_M, head_M)


def masked_tokens(tokenizer: Tokenizer, ids_T: NDArray[np.int32], message: Message) -> NDArray[np.bool_]:
    """Which tokens of a message's content (T) have a byte in one of its masked spans."""
    end_T = np.cumsum([len(tokenizer.token_bytes(token)) for token in ids_T.tolist()])
    start_T = np.concatenate([[0], end_T[:-1]])
    found_T = np.zeros(len(ids_T), dtype=np.bool_)
    for first, last in message.masked:
        begin, end = (len(message.content[:at].encode()) for at in (first, last))
        found_T |= (start_T < end) & (end_T > begin)
    return found_T


def open_tokenizer(folder: str | Path | None) -> AnyTokenizer:
    """Lumina's tokenizer, or with a folder an imported model's own and its chat template.

    Raises:
        UserError: a file is missing or damaged, or the libraries that read it are not installed.
    """
    if folder is None:
        return Tokenizer.load()
    from lumina.chat.hf_tokenizer import ForeignTokenizer  # not at the top: prepare's workers must start fast

    return ForeignTokenizer(Path(folder))


def template_version(tokenizer: AnyTokenizer) -> str:
    """What stands for the template in a fingerprint of data."""
    return TEMPLATE_VERSION if isinstance(tokenizer, Tokenizer) else tokenizer.template_version


def is_learned(message: Message) -> bool:
    return message.learn and message.role in _LEARNED_ROLES


def render_sound(
    tokenizer: AnyTokenizer, conversations: Sequence[Conversation]
) -> tuple[RenderedBlock, dict[int, str]]:
    """`render_many` of the conversations that the template takes, and why it does not take the others, by number.
    Lumina's own takes all."""
    if isinstance(tokenizer, Tokenizer):
        return render_many(tokenizer, conversations), {}
    return tokenizer.render_sound(conversations)


def render(tokenizer: Tokenizer, conversation: Conversation) -> Rendered:
    """One conversation's ids, mask and message offsets."""
    block = render_many(tokenizer, [conversation])
    return Rendered(block.ids, block.mask, block.message_offsets)


def prompt_ids(tokenizer: AnyTokenizer, conversation: Conversation) -> list[int]:
    """The ids to generate from: the conversation so far and the opening of the assistant's turn.

    A prefix of `render` of the same conversation with the answer appended. Raises UserError when the template of an
    imported model does not take the conversation.
    """
    if not isinstance(tokenizer, Tokenizer):
        return tokenizer.prompt_ids(conversation)
    control = tokenizer.control_ids
    opening = [control["<|im_start|>"], control["<|assistant|>"]]
    return [*render(tokenizer, conversation).ids.tolist(), *opening]
