"""The text of each token of an answer, for its probabilities: texts that join to the answer.

A token's text depends on the tokens before it: a SentencePiece vocabulary drops the space of a text's first token, and
a character of several tokens is there with its last one, or as U+FFFD when the next is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lumina.chat import ChatTokenizer
from lumina.infer.generation.batch import Token

_CONTEXT = 4  # tokens before one that its text may depend on; no character has more


class TokenText(NamedTuple):
    """A token's text, empty when its character goes on, and the text of each of the likeliest had it come instead."""

    token: Token
    text: str
    others: dict[int, str]


class TokenTexts:
    """Of one answer, in order."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, tokenizer.incremental_decoder()
        self._before: list[int] = []
        self._held: list[TokenText] = []

    def push(self, tokens: Sequence[Token], ended: bool) -> list[TokenText]:
        """The texts of these tokens. `ended`: the answer ends with them. Before that a last token whose character goes
        on waits for the next call: should the answer end there, what is left of the character is its text."""
        found, self._held = self._held, []
        for token in tokens:
            text = self._decoder.push(token.id)
            found.append(TokenText(token, text, {other: self._instead(other) for other, _ in token.top}))
            self._before = [*self._before, token.id][-_CONTEXT:]
        if ended and found:
            found[-1] = found[-1]._replace(text=found[-1].text + self._decoder.end())
        elif found and self._tokenizer.decode(self._before).endswith("\ufffd"):
            self._held = [found.pop()]
        return [one._replace(others=one.others | {one.token.id: one.text}) for one in found]

    def _instead(self, token: int) -> str:
        alone = self._tokenizer.decode([token])
        before, whole = self._tokenizer.decode(self._before), self._tokenizer.decode([*self._before, token])
        if not before or not whole.startswith(before):
            return alone
        text = whole[len(before) :]
        return text if alone.startswith("\ufffd") else text.lstrip("\ufffd")

    def bytes_of(self, token: int, text: str) -> list[int] | None:
        """The bytes of a token; None where its vocabulary does not tell them, of a part of a character."""
        raw = self._tokenizer.token_bytes(token)
        if self._tokenizer.folder is None:
            return list(raw)
        return None if "\ufffd" in raw.decode() + text else list(text.encode())
