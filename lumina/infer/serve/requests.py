"""Request bodies: the fields of both completion endpoints as OpenAI's API reference has them, and the settings that
Lumina adds (top_k, min_p, repetition_penalty; openai's client sends them with `extra_body`).

Fields that would change an answer and are not supported are refused by name; those that change nothing are taken and
ignored.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lumina.infer.generation.sampling import Sampling

CHOICES = 16  # answers to one request at most


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # ignored


class CompletionOptions(StrictModel):
    """What requests to both completion endpoints share."""

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
        """How to choose; Lumina's defaults where a field is missing. Raises UserError outside the ranges."""
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
