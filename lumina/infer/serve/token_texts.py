"""The text of each token of an answer, for its probabilities: texts that join to the answer.

A token's text depends on the tokens before it: a SentencePiece vocabulary drops the space of a text's first token, and
a character of several tokens is there with its last one, or as U+FFFD when the next is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lumina.chat import ChatTokenizer
from lumina.infer.generation.batch import Token

_CONTEXT = 4  # tokens before one that its text may depend on; no character has more


class TokenTexts:
    """Of one answer, in order."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, tokenizer.incremental_decoder()
        self._before: list[int] = []

    def push(self, tokens: Sequence[Token], ended: bool) -> list[tuple[str, dict[int, str]]]:
        """For each token its text, empty when its character goes on, and the text of each of the likeliest had it come
        instead. `ended`: the last of these is the answer's last."""
        found = []
        for at, token in enumerate(tokens):
            text = self._decoder.push(token.id)
            if ended and at == len(tokens) - 1:
                text += self._decoder.end()
            others = {other: text if other == token.id else self._instead(other) for other, _ in token.top}
            found.append((text, others))
            self._before = [*self._before, token.id][-_CONTEXT:]
        return found

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
