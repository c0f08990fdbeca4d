"""Response bodies of completions in OpenAI's format, whole or in chunks: what chat and text completions share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lumina.chat import ChatTokenizer
from lumina.infer.generation.batch import Token
from lumina.infer.serve.batcher import Delta

_LEAST = -9999.0  # JSON has no minus infinity


@dataclass
class Choice:
    """One of a request's answers, so far or in a chunk."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        if delta.token is not None:
            self.tokens.append(delta.token)
        if delta.finish is not None:
            self.finish = "stop" if delta.finish == "stop" else "length"


def by_choice(deltas: Iterable[Delta], choices: dict[int, Choice] | None = None) -> dict[int, Choice]:
    """Deltas sorted into their choices, by number; added to `choices` when given."""
    choices = {} if choices is None else choices
    for delta in deltas:
        choices.setdefault(delta.sequence.number, Choice()).add(delta)
    return choices


class ResponseBuilder(ABC):
    """Builds the response to one request."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(
        self, tokenizer: ChatTokenizer, model: str, fingerprint: str, response_id: str, logprobs: bool, prompt: int
    ) -> None:
        """`prompt`: tokens of the request's prompts, for the usage."""
        self._tokenizer, self._logprobs, self._prompt = tokenizer, logprobs, prompt
        self._completion = 0
        common = {"id": f"{self.prefix}-{response_id}", "created": int(time.time()), "model": model}
        self._common = common | {"system_fingerprint": fingerprint}

    def body(self, choices: dict[int, Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        for choice in choices.values():
            self._completion += len(choice.tokens)
        bodies = [self._choice_body(index, choice) for index, choice in sorted(choices.items())]
        return {**self._common, "object": self.kind, "choices": bodies, "usage": self.usage()}

    def chunks(self, deltas: list[Delta]) -> list[dict[str, Any]]:
        """What has come, a chunk for each choice that it belongs to."""
        found = []
        for index, choice in sorted(by_choice(deltas).items()):
            self._completion += len(choice.tokens)
            if choice.text or choice.finish or (self._logprobs and choice.tokens):
                found.append(self._chunk([self._choice_chunk(index, choice)]))
        return found

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        return []

    def final_chunk(self) -> dict[str, Any]:
        """The chunk that only holds the usage."""
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        total = self._prompt + self._completion
        return {"prompt_tokens": self._prompt, "completion_tokens": self._completion, "total_tokens": total}

    def _chunk(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": self.chunk_kind, "choices": parts}

    @abstractmethod
    def _choice_body(self, index: int, choice: Choice) -> dict[str, Any]:
        """One of the answers, whole."""

    @abstractmethod
    def _choice_chunk(self, index: int, choice: Choice) -> dict[str, Any]:
        """What has come of one of them, in a chunk."""

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])


def finite_logprob(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
