"""POST /v1/completions: go on with texts, as OpenAI's API reference has it ("Completions")."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from fastapi import Request
from pydantic import Field, field_validator
from starlette.responses import Response

from lumina.chat import ContentReader
from lumina.config import UserError
from lumina.infer.generation.generate import check_prompt
from lumina.infer.generation.sampling import forbidden_tokens
from lumina.infer.serve.completion import Task, check_model, complete
from lumina.infer.serve.endpoint import Endpoint, service_of
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.requests import CHOICES, CompletionOptions, read_body
from lumina.infer.serve.responses import Choice, ResponseBuilder, finite_logprob
from lumina.infer.serve.service import Service

IDS = 1 << 20  # of tokens in a prompt


class CompletionRequest(CompletionOptions):
    """POST /v1/completions."""

    longest: ClassVar = {"prompt": IDS}

    prompt: list[str | list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> list[str | list[int]]:
        """One prompt or several, each a text or the ids of its tokens."""
        if isinstance(value, str) or (_is_ids(value) and value):
            return [value]
        if not isinstance(value, list) or not all(isinstance(one, str) or _is_ids(one) for one in value):
            raise ValueError("takes a text, a list of token ids, or a list of either")
        return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


class TextResponse(ResponseBuilder):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._offsets: dict[int, int] = {}  # of each choice, characters sent so far

    def _choice_body(self, index: int, choice: Choice) -> dict[str, Any]:
        ending = {"logprobs": self._table(index, choice), "finish_reason": choice.finish}
        return {"index": index, "text": choice.text, **ending}

    _choice_chunk = _choice_body

    def _table(self, index: int, choice: Choice) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        entries = self._token_texts(index).push(choice.tokens, choice.finish is not None)
        texts, offsets, at = [entry.text for entry in entries], list[int](), self._offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        # Two tokens may look alike as text: the likelier one is reported.
        top = [
            {entry.others[other]: finite_logprob(logprob) for other, logprob in reversed(entry.token.top)}
            for entry in entries
        ]
        values = [finite_logprob(entry.token.logprob) for entry in entries]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


async def completions(request: Request) -> Response:
    """Go on with texts."""
    service, ids = service_of(request), list[list[int]]()
    body = await read_body(request, CompletionRequest)
    check_model(service, body.model)
    if not 1 <= len(body.prompt) * body.n <= CHOICES:
        raise ApiError(400, f"1 to {CHOICES} answers can be asked for, prompts times n", param="prompt")
    for prompt in body.prompt:
        if isinstance(prompt, str):
            ids.append(await service.tokenized(lambda prompt=prompt: service.tokenizer.text_ids(prompt), "prompt"))  # type: ignore[misc]
        else:
            ids.append(await service.tokenized(lambda prompt=prompt: _only_text(service, prompt), "prompt"))  # type: ignore[misc]
    task = Task(ids, lambda: ContentReader(service.loaded.tokenizer.incremental_decoder()), body.logprobs)
    return await complete(service, body, task, TextResponse, request)


def _only_text(service: Service, ids: list[int]) -> list[int]:
    """Token ids from outside are text: special tokens come from the template only."""
    check_prompt(len(ids), service.context_length)  # before each is looked at
    size = service.loaded.config.vocab_size
    text_V = ~forbidden_tokens(service.tokenizer, size)
    text_V[[token for token in service.tokenizer.stop_ids if token < size]] = False
    allowed = text_V.tolist()
    for token in ids:
        if not 0 <= token < size or not allowed[token]:
            raise UserError(f"{token} is not the id of a token of text")
    return ids


ENDPOINTS = (Endpoint("POST", "/v1/completions", completions),)
