"""From prompts to a response: what the chat and the text completion endpoints do alike."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response

from lumina.chat import AnswerReader
from lumina.infer.generation.batch import Sequence
from lumina.infer.generation.constraint import Constraint
from lumina.infer.generation.sampling import Sampling, SamplingError
from lumina.infer.serve.batcher import Delta
from lumina.infer.serve.endpoint import json_response
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.middleware import ARRIVED
from lumina.infer.serve.requests import CompletionOptions
from lumina.infer.serve.responses import Choice, ResponseBuilder, by_choice
from lumina.infer.serve.service import Service
from lumina.infer.serve.streaming import EventStream, events, stream_deltas

CLAMPED = "Lumina-Max-Tokens"
"""Header of an answer that could not be as long as was asked: the most tokens that it could have."""


@dataclass
class Task:
    """What is to be generated. `begun`: tokens that every answer begins with. `logprobs`: how many of the likeliest
    tokens to report with each token; None reports no probabilities. `constraint` makes one for each answer."""

    prompts: list[list[int]]
    reader: Callable[[], AnswerReader]
    logprobs: int | None = None
    begun: list[int] = field(default_factory=list)
    constraint: Callable[[], Constraint] | None = None
    most_calls: int | None = None


def check_model(service: Service, name: str | None) -> None:
    """Raise ApiError when a request is for another model."""
    if name is not None and name != service.name:
        raise ApiError(404, f"There is no model {name[:80]!r}: this is {service.name!r}.", "model_not_found", "model")


def _sampling(service: Service, body: CompletionOptions, task: Task) -> tuple[Sampling, dict[str, str]]:
    """How to choose, and headers. A limit beyond the server's or the context's is clamped, and that is said; what the
    answer begins with is cut to it. Raises ApiError."""
    name, asked = body.limit()
    room = service.context_length - min(map(len, task.prompts))
    most = min(service.most_tokens, room)
    if asked is not None and asked < 1:
        raise ApiError(400, f"{name} {asked} is less than 1", param=name)
    length = most if asked is None else min(asked, most)
    task.begun = task.begun[: length - 1]  # they are the answer's own tokens, and the model says at least one
    try:
        # The server's own limit stands where the context ends an answer, so that its end is told as what it is.
        sampling = body.sampling(min(asked or service.most_tokens, service.most_tokens) - len(task.begun))
    except SamplingError as error:
        raise ApiError(400, f"{error.setting} {error.reason}", param=error.setting) from None
    return sampling, {CLAMPED: str(length)} if asked is not None and length < asked else {}


async def complete(
    service: Service, body: CompletionOptions, task: Task, builder: type[ResponseBuilder], request: Request
) -> Response:
    """Generate and answer as `body` asks, whole or streamed. Raises ApiError."""
    sampling, headers = _sampling(service, body, task)
    sequences = []
    for p, prompt in enumerate(task.prompts):
        for i in range(body.n):
            constraint = None if task.constraint is None else task.constraint()
            if constraint is not None:
                for token in task.begun:
                    constraint.push(token)
            ids = [*prompt, *task.begun]
            sequences.append(Sequence(ids, sampling, p * body.n + i, task.logprobs, constraint))
    response = builder(
        service.tokenizer,
        service.name,
        f"step-{service.loaded.step}",
        secrets.token_hex(12),
        task.logprobs is not None,
        sum(map(len, task.prompts)),
        len(task.begun) * len(sequences),
        # Several answers to a prompt count it once: by the first, since the others may go on from that one.
        lambda: sum(min(s.reused, len(s.prompt) - len(task.begun)) for s in sequences[:: body.n]),
    )
    deltas = stream_deltas(
        service.batcher, sequences, task.reader, _left(service, request), request.receive, task.begun, task.most_calls
    )
    if body.stream:
        first = await anext(deltas)  # what is refused is refused with its own status, before a stream begins
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(response, len(sequences), first, deltas, usage), service.stall, headers)
    choices: dict[int, Choice] = {}
    async with aclosing(deltas):  # type: ignore[type-var]
        async for new in deltas:
            by_choice(new, choices)
    return json_response(response.body(choices), headers=headers)


def _left(service: Service, request: Request) -> float:
    """Seconds of a request's time that reading and tokenizing it left."""
    arrived: float = request.scope[ARRIVED]
    return max(0.0, service.seconds - (time.monotonic() - arrived))


async def _events(
    response: ResponseBuilder, choices: int, first: list[Delta], deltas: AsyncIterator[list[Delta]], usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. An error after the first word can only be an event."""
    extra = {"usage": None} if usage else {}

    async with aclosing(deltas):  # type: ignore[type-var]
        yield events([chunk | extra for chunk in [*response.first_chunks(choices), *response.chunks(first)]])
        try:
            async for new in deltas:
                chunks = response.chunks(new)
                if chunks:
                    yield events([chunk | extra for chunk in chunks])
        except ApiError as error:
            if error.status == 499:
                raise
            yield events([error.body()])
            return
        yield (events([response.final_chunk()]) if usage else b"") + b"data: [DONE]\n\n"
