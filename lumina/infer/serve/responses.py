"""Answers in OpenAI's shapes (API reference: "Chat Completions", "Completions"), whole and in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lumina.chat import ChatTokenizer
from lumina.infer.generation.batch import Token
from lumina.infer.serve.batcher import Piece

_LEAST = -9999.0  # JSON has no minus infinity


@dataclass
class Choice:
    """One of a request's answers, so far or in a chunk."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        if piece.token is not None:
            self.tokens.append(piece.token)
        if piece.finish is not None:
            self.finish = "stop" if piece.finish == "stop" else "length"


def by_choice(pieces: Iterable[Piece], choices: dict[int, Choice] | None = None) -> dict[int, Choice]:
    """Pieces sorted into their choices, by number; added to `choices` when given."""
    choices = {} if choices is None else choices
    for piece in pieces:
        choices.setdefault(piece.sequence.number, Choice()).add(piece)
    return choices


class Shape(ABC):
    """How one request is answered."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(
        self, tokenizer: ChatTokenizer, model: str, fingerprint: str, identity: str, logprobs: bool, prompt: int
    ) -> None:
        """`prompt`: tokens of the request's prompts, for the account."""
        self._tokenizer, self._logprobs, self._prompt = tokenizer, logprobs, prompt
        self._said = 0
        common = {"id": f"{self.prefix}-{identity}", "created": int(time.time()), "model": model}
        self._common = common | {"system_fingerprint": fingerprint}

    def whole(self, choices: dict[int, Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        for choice in choices.values():
            self._said += len(choice.tokens)
        bodies = [self._choice(index, choice) for index, choice in sorted(choices.items())]
        return {**self._common, "object": self.kind, "choices": bodies, "usage": self.usage()}

    def chunks(self, pieces: list[Piece]) -> list[dict[str, Any]]:
        """What has come, a chunk for each choice that it belongs to."""
        found = []
        for index, choice in sorted(by_choice(pieces).items()):
            self._said += len(choice.tokens)
            if choice.text or choice.finish or (self._logprobs and choice.tokens):
                found.append(self._chunk([self._part(index, choice)]))
        return found

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks before the first words."""
        return []

    def closing(self) -> dict[str, Any]:
        """The chunk that only holds the account."""
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        total = self._prompt + self._said
        return {"prompt_tokens": self._prompt, "completion_tokens": self._said, "total_tokens": total}

    def _chunk(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": self.chunk_kind, "choices": parts}

    @abstractmethod
    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """One of the answers, whole."""

    @abstractmethod
    def _part(self, index: int, choice: Choice) -> dict[str, Any]:
        """What has come of one of them, in a chunk."""

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])


class ChatShape(Shape):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, choices: int) -> list[dict[str, Any]]:
        start: dict[str, Any] = {"logprobs": None, "finish_reason": None}
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": index, "delta": delta, **start}]) for index in range(choices)]

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, **self._ending(choice)}

    def _part(self, index: int, choice: Choice) -> dict[str, Any]:
        return {"index": index, "delta": {"content": choice.text} if choice.text else {}, **self._ending(choice)}

    def _ending(self, choice: Choice) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            logprobs = {"content": [self._entry(token) for token in choice.tokens], "refusal": None}
        return {"logprobs": logprobs, "finish_reason": choice.finish}

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._one(other, logprob) for other, logprob in token.top]
        return self._one(token.id, token.logprob) | {"top_logprobs": top}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self._text(token), self._tokenizer.token_bytes(token)
        unknown = "\ufffd" in text and raw == text.encode()  # a part of a character, whose bytes nobody told
        return {"token": text, "logprob": _finite(logprob), "bytes": None if unknown else list(raw)}


class TextShape(Shape):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._offsets: dict[int, int] = {}  # of each choice, characters told so far

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        ending = {"logprobs": self._table(index, choice.tokens), "finish_reason": choice.finish}
        return {"index": index, "text": choice.text, **ending}

    _part = _choice

    def _table(self, index: int, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        texts, offsets, at = [self._text(token.id) for token in tokens], list[int](), self._offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        # Two tokens may look alike as text: the likelier one is told.
        top = [{self._text(other): _finite(logprob) for other, logprob in reversed(token.top)} for token in tokens]
        values = [_finite(token.logprob) for token in tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
