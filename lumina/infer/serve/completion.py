"""From prompts to a response: what the chat and the text completion endpoints do alike."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from lumina.infer.generation.batch import Sequence
from lumina.infer.generation.sampling import SamplingError
from lumina.infer.serve.batcher import Delta
from lumina.infer.serve.endpoint import json_response
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.requests import CompletionOptions
from lumina.infer.serve.responses import Choice, ResponseBuilder, by_choice
from lumina.infer.serve.service import Service
from lumina.infer.serve.streaming import EventStream, stream_deltas

_PARAMS = {"max_length": "max_tokens"}  # settings of Sampling that the API calls something else


async def complete(
    service: Service,
    body: CompletionOptions,
    prompts: list[list[int]],
    logprobs: int | None,
    builder: type[ResponseBuilder],
    request: Request,
) -> Response:
    """Generate for the prompts and answer as `body` asks, whole or streamed. Raises ApiError.

    logprobs: how many of the likeliest tokens to report with each token; None reports no probabilities.
    """
    if body.model is not None and body.model != service.name:
        raise ApiError(404, f"There is no model {body.model!r}: this is {service.name!r}.", "model_not_found", "model")
    if (body.limit() or 0) > service.most_tokens:
        text = f"max_tokens {body.limit()} is more than this server's {service.most_tokens}"
        raise ApiError(400, text, param="max_tokens")
    try:
        sampling = body.sampling(service.most_tokens)
    except SamplingError as error:
        param = _PARAMS.get(error.setting, error.setting)
        raise ApiError(400, f"{param} {error.reason}", param=param) from None
    each = [(ids, p * body.n + i) for p, ids in enumerate(prompts) for i in range(body.n)]
    sequences = [Sequence(ids, sampling, number, logprobs) for ids, number in each]
    step = f"step-{service.loaded.step}"
    tokens = sum(map(len, prompts))
    response_id = secrets.token_hex(12)
    response = builder(service.tokenizer, service.name, step, response_id, logprobs is not None, tokens)
    deltas = stream_deltas(service.batcher, sequences, service.seconds, request.receive)
    if body.stream:
        first = await anext(deltas)  # what is refused is refused with its own status, before a stream begins
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(response, len(sequences), first, deltas, usage), service.stall)
    choices: dict[int, Choice] = {}
    async with aclosing(deltas):  # type: ignore[type-var]
        async for new in deltas:
            by_choice(new, choices)
    return json_response(response.body(choices))


async def _events(
    response: ResponseBuilder, choices: int, first: list[Delta], deltas: AsyncIterator[list[Delta]], usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. An error after the first word can only be an event."""
    extra = {"usage": None} if usage else {}

    def lines(chunks: list[dict[str, Any]]) -> bytes:
        return b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)

    async with aclosing(deltas):  # type: ignore[type-var]
        yield lines([chunk | extra for chunk in [*response.first_chunks(choices), *response.chunks(first)]])
        try:
            async for new in deltas:
                chunks = response.chunks(new)
                if chunks:
                    yield lines([chunk | extra for chunk in chunks])
        except ApiError as error:
            if error.status == 499:
                raise
            yield lines([error.body()])
            return
        yield (lines([response.final_chunk()]) if usage else b"") + b"data: [DONE]\n\n"
