"""The bodies of requests, as OpenAI's API reference has them, and the settings that Lumina adds (top_k, min_p,
repetition_penalty; openai's client sends them with `extra_body`).

Fields that would change an answer and are not supported are refused by name; those that change nothing are taken and
ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lumina.chat import Conversation, Message
from lumina.infer.generation.sampling import Sampling

CHOICES = 16  # answers to one request at most
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # ignored


class _Request(_Strict):
    """What both kinds of requests share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 and -1: no limit, as other servers spell it
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: Any = None  # ignored, as are the next
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("n", mode="before")
    @classmethod
    def _one_when_null(cls, value: Any) -> Any:
        return 1 if value is None else value

    @field_validator("stream", mode="before")
    @classmethod
    def _off_when_null(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("presence_penalty", "frequency_penalty", "logit_bias")
    @classmethod
    def _neutral(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported by this server; repetition_penalty is")
        return value

    def limit(self) -> int | None:
        """The most new tokens that the request asks for."""
        return self.max_tokens

    def sampling(self, most: int) -> Sampling:
        """How to choose; Lumina's defaults where nothing is said. Raises UserError outside the ranges."""
        wanted: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        if self.top_k in (0, -1):
            given["top_k"] = None
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        limit = self.limit()
        return Sampling(**given, max_length=most if limit is None else limit, stop=tuple(stop))


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Any = None  # ignored
    refusal: None = None  # openai's client sends an answer's empty fields back
    audio: None = None
    annotations: Any = None
    function_call: None = None
    tool_calls: None = None

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(_ROLES[self.role], text)


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None  # ignored

    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def conversation(self) -> Conversation:
        return Conversation([message.message() for message in self.messages])

    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to report; None: no probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        found: list[str | list[int]] = []
        for part in self.prompt:
            if isinstance(part, int):  # one prompt, of ids
                return [[token for token in self.prompt if isinstance(token, int)]]
            found.append(part)
        return found
