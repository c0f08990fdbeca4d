"""Incremental decoding with any Hugging Face tokenizer (an IncrementalDecoder)."""

from __future__ import annotations

from collections.abc import Callable


class PrefixDecoder:
    """Decodes all ids so far each time and gives what is new: right for any tokenizer, whatever its spaces do. Answers
    are at most 2,048 tokens, so the repeated work stays far below a forward pass."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode, self._ids, self._given = decode, list[int](), 0

    def _new(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._new(self._decode(self._ids).rstrip("\ufffd"))

    def end(self) -> str:
        return self._new(self._decode(self._ids))
