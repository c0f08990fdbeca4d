"""How a model is spoken to: its tokenizer and template behind the few questions that generation asks.

A model trained here speaks Lumina's template. An imported one (lumina import) keeps the tokenizer.json and the Jinja
chat template that it was trained with, in RUN/tokenizer/ (lumina.chat.hf_tokenizer).

Two laws hold for both: control tokens come from the template and never from text a user typed, and the model itself
says only text and its stop token.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lumina.chat import Conversation, Tokenizer, open_tokenizer, prompt_ids, render_many
from lumina.chat.hf_tokenizer import ForeignTokenizer


class TextStream(Protocol):
    """Tokens to text as they arrive; text comes out in whole characters."""

    def push(self, token: int) -> str: ...

    def end(self) -> str:
        """What was still held back, U+FFFD for broken characters."""


class Span(NamedTuple):
    """Tokens [start, end) of a conversation: the content of message number `message` and the token that ends it."""

    message: int
    start: int
    end: int


class Voice(Protocol):
    """A tokenizer and chat template."""

    stop_ids: frozenset[int]
    begin_id: int
    """Stands before a text of which the first token is to be predicted."""

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids to generate from, ending where the assistant's words begin. Raises UserError."""

    def plain(self, text: str) -> list[int]:
        """The ids of a text that is to be continued, not answered. Raises UserError."""

    def rendered(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        """A whole conversation: its ids, and where its messages are in them. Raises UserError."""

    def forbidden(self, vocab_size: int) -> Tensor:
        """Ids that are never sampled: bool (V)."""

    def decode(self, ids: list[int]) -> str: ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be part of a character."""

    def text_stream(self) -> TextStream: ...


class _Utf8Stream:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class LuminaVoice:
    """Lumina's own tokenizer and template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset([tokenizer.stop_id])
        self.begin_id = tokenizer.end_of_text_id

    def prompt(self, conversation: Conversation) -> list[int]:
        return prompt_ids(self.tokenizer, conversation)

    def plain(self, text: str) -> list[int]:
        return [self.tokenizer.end_of_text_id, *self.tokenizer.encode(text)]

    def rendered(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        block = render_many(self.tokenizer, [conversation])
        starts, ends = block.message_offsets[:-1] + block.head, block.message_offsets[1:]
        return block.ids.tolist(), [Span(i, int(a), int(b)) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]

    def forbidden(self, vocab_size: int) -> Tensor:
        """Everything that is not text, except the stop token; ids past the tokenizer's own pad the vocabulary."""
        return ~torch.from_numpy(self.tokenizer.sayable(vocab_size))

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def token_bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token)

    def text_stream(self) -> TextStream:
        return _Utf8Stream(self.tokenizer)


class ForeignVoice:
    """An imported model's tokenizer and template."""

    def __init__(self, tokenizer: ForeignTokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = tokenizer.stop_ids
        self.begin_id = tokenizer.begin_id

    def prompt(self, conversation: Conversation) -> list[int]:
        return self.tokenizer.prompt_ids(conversation)

    def plain(self, text: str) -> list[int]:
        return self.tokenizer.text_ids(text)

    def rendered(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        """Only the assistants' messages are placed: what they add besides is the template's."""
        ids, spans = self.tokenizer.spans(conversation)
        return ids, [Span(*span) for span in spans]

    def forbidden(self, vocab_size: int) -> Tensor:
        """Everything that is not text, except the stop tokens."""
        return ~torch.from_numpy(self.tokenizer.sayable(vocab_size))

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode_text(ids)

    def token_bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token)

    def text_stream(self) -> TextStream:
        return _DecodedStream(self)


def voice_of(folder: Path | None) -> Voice:
    """How a model is spoken to whose own tokenizer is in `folder`, or that has none of its own. Raises UserError."""
    tokenizer = open_tokenizer(folder)
    return LuminaVoice(tokenizer) if isinstance(tokenizer, Tokenizer) else ForeignVoice(tokenizer)


class _DecodedStream:
    """Decodes all ids so far each time and gives what is new: right for any tokenizer, whatever its spaces do. Answers
    are at most 2,048 tokens, so the repeated work stays far below a forward pass."""

    def __init__(self, voice: ForeignVoice) -> None:
        self._voice, self._ids, self._said = voice, list[int](), 0

    def _new(self, text: str) -> str:
        new = text[self._said :]
        self._said = max(self._said, len(text))
        return new

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._voice.decode(self._ids)
        return self._new(text.rstrip("\ufffd"))

    def end(self) -> str:
        return self._new(self._voice.decode(self._ids))
