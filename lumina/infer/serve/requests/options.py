"""The fields that requests to both completion endpoints share, and the settings that Lumina adds (top_k, min_p,
repetition_penalty; openai's client sends them with `extra_body`)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from lumina.infer.generation.sampling import Sampling
from lumina.infer.serve.requests.strict import ANY, StrictModel

CHOICES = 16  # answers to one request at most
_STOP = "is not supported by this server: stop takes texts"
_PENALTY = "is not supported by this server; repetition_penalty is"


class StreamOptions(StrictModel):
    no_effect: ClassVar = {"include_obfuscation": (ANY,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class CompletionOptions(StrictModel):
    """What requests to both completion endpoints share."""

    no_effect: ClassVar = {
        "user": (ANY,),
        "metadata": (ANY,),
        "store": (ANY,),
        "service_tier": (ANY,),
        "safety_identifier": (ANY,),
        "prompt_cache_key": (ANY,),
        "prompt_cache_retention": (ANY,),
        "prompt_cache_options": (ANY,),
        "prediction": (ANY,),
        "priority": (ANY,),
        "request_id": (ANY,),
        "presence_penalty": (0, 0.0),
        "frequency_penalty": (0, 0.0),
        "logit_bias": ({},),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "use_beam_search": (False,),
        "ignore_eos": (False,),
        "min_tokens": (0,),
        "length_penalty": (1, 1.0),
        "typical_p": (1, 1.0),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True, False),
        "include_stop_str_in_output": (False,),
        "stop_token_ids": ([],),
        "bad_words": ([],),
        "return_token_ids": (False,),
        "prompt_logprobs": (False,),
    }
    refused: ClassVar = {
        "presence_penalty": _PENALTY,
        "frequency_penalty": _PENALTY,
        "logit_bias": "is not supported by this server",
        "best_of": "is not supported by this server: ask for n answers",
        "echo": "is not supported by this server: the prompt is not repeated",
        "suffix": "is not supported by this server: it goes on with a text, and fills none in",
        "stop_token_ids": _STOP,
        "bad_words": "is not supported by this server",
        "min_tokens": "is not supported by this server",
        "ignore_eos": "is not supported by this server",
    }

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 and -1: no limit, as other servers spell it
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    stop: list[str] = Field([])
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1

    @field_validator("stop", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> list[str]:
        """One text, or several; empty ones end nothing."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("takes a text or a list of texts")
        return [text for text in texts if text]

    def limit(self) -> tuple[str, int | None]:
        """The most new tokens that the request asks for, and the field that says so."""
        return "max_tokens", self.max_tokens

    def sampling(self, most: int) -> Sampling:
        """How to choose, for an answer of `most` tokens; Lumina's defaults where a field is missing. Raises
        SamplingError outside the ranges."""
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
        return Sampling(**given, max_length=most, stop=tuple(self.stop))
