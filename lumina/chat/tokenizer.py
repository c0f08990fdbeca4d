"""Lumina's chat tokenizer: cl100k_base with Lumina's special tokens, and Lumina's chat template."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from lumina.chat import conversation as rule
from lumina.chat import template
from lumina.chat.cl100k import Cl100kEncoder
from lumina.chat.conversation import Conversation
from lumina.chat.protocol import AnswerReader, ContentReader, IncrementalDecoder, MessageSpan, RenderedBlock


class Tokenizer(Cl100kEncoder):
    """Text to ids and back, and conversations to ids and loss masks (a ChatTokenizer; its docstrings say more). Cheap
    to make: the vocabulary is read (0.2 s) when text is first encoded or decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None
        self.begin_id: int = self.end_of_text_id
        self.stop_ids: frozenset[int] = frozenset([self.stop_id])
        self.template_version = template.TEMPLATE_VERSION + rule.SUPERVISION_VERSION

    @classmethod
    def load(cls) -> Tokenizer:
        """The tokenizer every room uses."""
        return cls()

    def incremental_decoder(self) -> IncrementalDecoder:
        return _Utf8Decoder(self)

    def answer_reader(self) -> AnswerReader:
        return ContentReader(self.incremental_decoder())

    def prompt_ids(self, conversation: Conversation, thinking: bool | None = None) -> list[int]:
        return template.prompt_ids(self, conversation)

    def text_ids(self, text: str) -> list[int]:
        return [self.end_of_text_id, *self.encode(text)]

    def message_spans(self, conversation: Conversation) -> tuple[list[int], list[MessageSpan]]:
        """The spans of every message."""
        block = template.render_many(self, [conversation])
        starts, ends = block.message_offsets[:-1] + block.head, block.message_offsets[1:]
        spans = zip(range(len(starts)), starts.tolist(), ends.tolist(), strict=True)
        return block.ids.tolist(), [MessageSpan(*span) for span in spans]

    def render_valid(self, conversations: Sequence[Conversation]) -> tuple[RenderedBlock, dict[int, str]]:
        """Lumina's template takes every conversation."""
        return template.render_many(self, conversations), {}

    def check_trainable(self) -> None:
        """Never raises: Lumina's template takes every conversation."""

    def warm_up(self) -> None:
        self.encode_many([" "])


class _Utf8Decoder:
    """Bytes of tokens to whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)
