"""How a model is spoken to: its tokenizer and template behind the few questions that generation asks.

A model trained here speaks Lumina's template. An imported one (lumina import) keeps the tokenizer.json and the Jinja
chat template that it was trained with, in RUN/tokenizer/, read through transformers without remote code.

Two laws hold for both: control tokens come from the template and never from text a user typed, and the model itself
says only text and its stop token.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lumina.chat import Conversation, Tokenizer, prompt_ids, render_many
from lumina.config import UserError


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

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids to generate from, ending where the assistant's words begin. Raises UserError."""

    def plain(self, text: str) -> list[int]:
        """The ids of a text that is to be continued, not answered. Raises UserError."""

    def rendered(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        """A whole conversation: its ids, and where its messages are in them. Raises UserError."""

    def forbidden(self, vocab_size: int) -> Tensor:
        """Ids that are never sampled: bool (V)."""

    def decode(self, ids: list[int]) -> str: ...

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
        forbidden_V = torch.ones(vocab_size, dtype=torch.bool)
        forbidden_V[: self.tokenizer.text_ids] = False
        forbidden_V[self.tokenizer.stop_id] = False
        return forbidden_V

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def text_stream(self) -> TextStream:
        return _Utf8Stream(self.tokenizer)


class ForeignVoice:
    """An imported model's tokenizer and template, from a folder of Hugging Face files."""

    def __init__(self, folder: Path, stop_ids: frozenset[int]) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UserError(
                "an imported model's tokenizer needs transformers", "Install it with `pip install 'lumina[hf]'`."
            ) from None
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises anything for a file that it does not like
            raise UserError(f"{folder}: the tokenizer cannot be read: {error}") from None
        self.stop_ids = stop_ids

    def _checked(self, conversation: Conversation) -> list[dict[str, str]]:
        if self._tokenizer.chat_template is None:
            raise UserError("this imported model has no chat template: it is a base model that was not taught to chat")
        for message in conversation.messages:
            self._check_text(message.content)
        return [{"role": message.role, "content": message.content} for message in conversation.messages]

    def _check_text(self, text: str) -> None:
        controls = (str(token) for token in self._tokenizer.added_tokens_encoder)
        typed = next((control for control in controls if control in text), None)
        if typed is not None:
            raise UserError(f"the message contains {typed}, which is a control token of this imported model")

    def plain(self, text: str) -> list[int]:
        self._check_text(text)
        return [int(token) for token in self._tokenizer.encode(text)]

    def _templated(self, messages: list[dict[str, str]], opening: bool) -> list[int]:
        try:
            encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=opening, return_dict=True)
        except Exception as error:  # a template may raise_exception() for an order of roles that it does not know
            raise UserError(f"the imported model's chat template refuses this conversation: {error}") from None
        return [int(token) for token in encoded["input_ids"]]

    def prompt(self, conversation: Conversation) -> list[int]:
        return self._templated(self._checked(conversation), opening=True)

    def rendered(self, conversation: Conversation) -> tuple[list[int], list[Span]]:
        """Only the assistants' messages are placed: each is what it adds to the prompt before it."""
        messages = self._checked(conversation)
        ids = self._templated(messages, opening=False)
        spans = []
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._templated(messages[:at], opening=True)
                after = self._templated(messages[: at + 1], opening=False)
                if ids[: len(before)] != before or ids[: len(after)] != after:
                    raise UserError("the imported model's chat template rewrites earlier turns: it cannot be evaluated")
                spans.append(Span(at, len(before), len(after)))
        return ids, spans

    def forbidden(self, vocab_size: int) -> Tensor:
        forbidden_V = torch.zeros(vocab_size, dtype=torch.bool)
        forbidden_V[len(self._tokenizer) :] = True
        special = [token for token in self._tokenizer.all_special_ids if token < vocab_size]
        forbidden_V[torch.tensor(special, dtype=torch.long)] = True
        forbidden_V[torch.tensor(sorted(self.stop_ids), dtype=torch.long)] = False
        return forbidden_V

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def text_stream(self) -> TextStream:
        return _DecodedStream(self)


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
