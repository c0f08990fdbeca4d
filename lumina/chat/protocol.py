"""The chat tokenizer protocol: what the other rooms ask of a tokenizer with its chat template, ours or an imported one.

Two laws hold for every implementation: special tokens come from the template and never from text that a user typed,
and the model itself may say only text and its stop tokens.

Shapes: T tokens, M messages, N conversations, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lumina.chat.conversation import Conversation, ToolCall

BLOCK_SECONDS = 600.0
"""What an imported model's tokenizer may take of a processor for a block of conversations: one may have millions of
tokens."""


class RenderedBlock(NamedTuple):
    """N tokenized conversations one after another.

    ids_T int32, mask_T uint8 (1: supervised), message_offsets int64[M+1] into T, conversation_offsets int64[N+1] into
    M, supervised_M bool (the message has supervised tokens), head_M int64 (the template's tokens before its content),
    source_N int64 (which of the given conversations it is), repeated_M bool (context that an earlier one of the same
    source has too, and accounts for), role_M int8 (the message's role, as an index into ROLES).

    A template that renders earlier turns differently once later ones follow makes several of one conversation. Each of
    its assistant's turns is supervised in one of them, in which the context is what the model would be asked with.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    message_offsets: NDArray[np.int64]
    conversation_offsets: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    head: NDArray[np.int64]
    source: NDArray[np.int64]
    repeated: NDArray[np.bool_]
    role: NDArray[np.int8]


class MessageSpan(NamedTuple):
    """Tokens [start, end) of a conversation: the content of message number `message` and the token that ends it."""

    message: int
    start: int
    end: int


class IncrementalDecoder(Protocol):
    """Tokens to text as they arrive; text comes out in whole characters."""

    def push(self, token: int) -> str: ...

    def end(self) -> str:
        """What was still held back, U+FFFD for broken characters."""


class AnswerDelta(NamedTuple):
    """What one token added to an answer: text in whole characters, and tool calls that are complete."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class AnswerReader(Protocol):
    """The tokens of one answer to its reasoning, content and tool calls, as they arrive: the template read backwards.

    What does not parse as a call is given as content, so that nothing that the model said is lost.
    """

    def push(self, token: int) -> AnswerDelta: ...

    def end(self) -> AnswerDelta:
        """What was still held back."""


class ContentReader:
    """Reads an answer of which everything is content (an AnswerReader)."""

    def __init__(self, decoder: IncrementalDecoder) -> None:
        self._decoder = decoder

    def push(self, token: int) -> AnswerDelta:
        return AnswerDelta(content=self._decoder.push(token))

    def end(self) -> AnswerDelta:
        return AnswerDelta(content=self._decoder.end())


class ChatTokenizer(Protocol):
    """A tokenizer and its chat template."""

    folder: Path | None
    """The imported model's tokenizer folder; None for Lumina's own."""
    vocab_size: int
    pad_id: int
    begin_id: int
    """Stands before a text of which the first token is to be predicted."""
    stop_ids: frozenset[int]
    template_version: str
    fingerprint: str
    """Of vocabulary, template and stop tokens: part of the fingerprint of prepared data."""
    earlier: tuple[str, str]
    """fingerprint and template_version of this tokenizer in releases whose format of prepared data is an earlier one: a
    run is resumed on what they prepared."""

    @property
    def chat_template(self) -> str | None:
        """The name of Lumina's own chat template, by which it is opened again; None for an imported model's."""

    def encode(self, text: str) -> list[int]:
        """Text as text: no special token comes out of it."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, special tokens by name."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be part of a character; a special token's name."""

    def incremental_decoder(self) -> IncrementalDecoder: ...

    def is_special(self, token: int) -> bool:
        """Whether the id is a special token, or none at all."""

    def answer_reader(self, prompt: Sequence[int] = ()) -> AnswerReader:
        """Reads the tokens of an answer to `prompt`, the ids that `prompt_ids` gave: they may have begun the answer's
        reasoning."""

    def allowed_tokens(self, vocab_size: int) -> NDArray[np.bool_]:
        """bool (V): text, the stop tokens, and those around reasoning and tool calls: what the model may say."""

    def prompt_ids(self, conversation: Conversation, thinking: bool | None = None) -> list[int]:
        """The ids to generate from: the conversation so far and the opening of the assistant's message. They are a
        prefix of the same conversation's ids with the answer. `thinking` asks for an answer with or without reasoning,
        where the template knows how; None leaves it to the template. Raises UserError: the template does not take it,
        or has no place for its tools."""

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text that is to be continued, not answered. Raises UserError."""

    def message_spans(self, conversation: Conversation) -> list[tuple[list[int], list[MessageSpan]]]:
        """A conversation's samples (several where the template rewrites history): the ids, and where messages are in
        them, each in one: all messages, or the assistant's where the template tells no more. Raises UserError."""

    def render_valid(self, conversations: Sequence[Conversation]) -> tuple[RenderedBlock, dict[int, str]]:
        """The conversations that the template takes, tokenized, and why it does not take the others, by number."""

    def check_trainable(self) -> None:
        """Raise UserError, by name, when no conversation of several turns could be trained on."""

    def warm_up(self) -> None:
        """Read the vocabulary now rather than with the first text."""

    def close(self) -> None:
        """End what it runs beside this process."""
