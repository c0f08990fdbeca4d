"""Lumina's chat tokenizer: cl100k_base with Lumina's special tokens, and Lumina's chat template."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from lumina.chat import conversation as rule
from lumina.chat import template
from lumina.chat.agent_parts import has_parts
from lumina.chat.answers import PartsReader
from lumina.chat.cl100k import Cl100kEncoder
from lumina.chat.conversation import Conversation
from lumina.chat.protocol import AnswerReader, ContentReader, IncrementalDecoder, MessageSpan, RenderedBlock
from lumina.config import UserError, did_you_mean


class Tokenizer(Cl100kEncoder):
    """Text to ids and back, and conversations to ids and loss masks (a ChatTokenizer; its docstrings say more). Cheap
    to make: the vocabulary is read (0.2 s) when text is first encoded or decoded.

    chat_template: one of TEMPLATES; None for the newest. Raises UserError: there is no such template.
    """

    def __init__(self, chat_template: str | None = None) -> None:
        name = template.NEWEST_TEMPLATE if chat_template is None else chat_template
        if name not in template.TEMPLATES:
            hint = did_you_mean(name, template.TEMPLATES)
            raise UserError(f"no chat template is called `{name}`.{hint}", f"They are {', '.join(template.TEMPLATES)}.")
        super().__init__(template.TEMPLATES[name])
        self.folder: Path | None = None
        self.chat_template: str = name
        self.begin_id: int = self.end_of_text_id
        self.stop_ids: frozenset[int] = frozenset([self.stop_id])
        self.template_version = name + rule.SUPERVISION_VERSION
        self.earlier: tuple[str, str] = (self.fingerprint, self.template_version)

    @classmethod
    def load(cls, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer that every room uses, with the newest template where none is named."""
        return cls(chat_template)

    def incremental_decoder(self) -> IncrementalDecoder:
        return _Utf8Decoder(self)

    def answer_reader(self, prompt: Sequence[int] = ()) -> AnswerReader:
        if not has_parts(self):
            return ContentReader(self.incremental_decoder())
        names = {token: name for name, token in self.special_ids.items()}
        begun = len(prompt) > 0 and prompt[-1] == self.special_ids["<|reasoning|>"]
        return PartsReader(self.incremental_decoder, names, reasoning=begun)

    def prompt_ids(self, conversation: Conversation, thinking: bool | None = None) -> list[int]:
        return template.prompt_ids(self, conversation, thinking)

    def text_ids(self, text: str) -> list[int]:
        return [self.end_of_text_id, *self.encode(text)]

    def message_spans(self, conversation: Conversation) -> list[tuple[list[int], list[MessageSpan]]]:
        """The spans of every message."""
        block = template.render_many(self, [conversation])
        starts, ends = block.message_offsets[:-1] + block.head, block.message_offsets[1:]
        spans = zip(range(len(starts)), starts.tolist(), ends.tolist(), strict=True)
        return [(block.ids.tolist(), [MessageSpan(*span) for span in spans])]

    def render_valid(self, conversations: Sequence[Conversation]) -> tuple[RenderedBlock, dict[int, str]]:
        return template.render_valid(self, conversations)

    def check_trainable(self) -> None:
        """Never raises: Lumina's template takes conversations of any number of turns."""

    def warm_up(self) -> None:
        self.encode_many([" "])

    def close(self) -> None:
        """Does nothing: all of it is in this process."""


class _Utf8Decoder:
    """Bytes of tokens to whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)
