"""Response bodies of completions in OpenAI's format, whole or in chunks: what chat and text completions share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lumina.chat import ChatTokenizer, ToolCall
from lumina.infer.generation.batch import Token
from lumina.infer.serve.batcher import Delta
from lumina.infer.serve.token_texts import TokenTexts

_LEAST = -9999.0  # JSON has no minus infinity


@dataclass
class Choice:
    """One of a request's answers, so far or in a chunk."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.text += delta.said.content
        self.reasoning += delta.said.reasoning
        self.calls += delta.said.tool_calls
        if delta.token is not None:
            self.tokens.append(delta.token)
        if delta.finish is not None:
            self.finish = "stop" if delta.finish == "stop" else "length"

    @property
    def said(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)


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
        self,
        tokenizer: ChatTokenizer,
        model: str,
        fingerprint: str,
        response_id: str,
        logprobs: bool,
        prompt: int,
        begun: int,
        cached: Callable[[], int],
    ) -> None:
        """For the usage: tokens of the request's prompts, and of its answers that they ended with; `cached`, once there
        is an answer, those of the prompts that the prefix cache spared."""
        self._cached = cached
        self._tokenizer, self._logprobs, self._prompt, self._completion = tokenizer, logprobs, prompt, begun
        self._texts: dict[int, TokenTexts] = {}  # of each choice
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
            if choice.said or choice.finish or (self._logprobs and choice.tokens):
                found.append(self._chunk([self._choice_chunk(index, choice)]))
        return found

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        return []

    def final_chunk(self) -> dict[str, Any]:
        """The chunk that only holds the usage."""
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        total = self._prompt + self._completion
        counts = {"prompt_tokens": self._prompt, "completion_tokens": self._completion, "total_tokens": total}
        return counts | {"prompt_tokens_details": {"cached_tokens": self._cached()}}

    def _chunk(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": self.chunk_kind, "choices": parts}

    @abstractmethod
    def _choice_body(self, index: int, choice: Choice) -> dict[str, Any]:
        """One of the answers, whole."""

    @abstractmethod
    def _choice_chunk(self, index: int, choice: Choice) -> dict[str, Any]:
        """What has come of one of them, in a chunk."""

    def _token_texts(self, index: int) -> TokenTexts:
        return self._texts.setdefault(index, TokenTexts(self._tokenizer))


def finite_logprob(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
