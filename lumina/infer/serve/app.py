"""The HTTP interface: OpenAI's paths, health, metrics, and the chat page."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lumina.chat import ChatTokenizer
from lumina.config import UserError
from lumina.infer.generation.batch import Sequence
from lumina.infer.generation.generate import check_prompt
from lumina.infer.generation.sampling import forbidden_tokens
from lumina.infer.loading import Loaded
from lumina.infer.serve.batcher import Engine, Piece
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.metrics import Metrics
from lumina.infer.serve.requests import CHOICES, ChatRequest, CompletionRequest
from lumina.infer.serve.responses import ChatShape, Choice, Shape, TextShape, by_choice
from lumina.infer.serve.streaming import EventStream, listen

ASSETS = Path(__file__).parent / "assets"
_FILES = {"/": "chat.html"} | {f"/{name}": name for name in ("chat.js", "markdown.js", "chat.css", "icon.svg")}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@dataclass
class Service:
    """What the paths share. `tokenizer` is not the engine's own: a tokenizer may not be used by two threads at once."""

    loaded: Loaded
    tokenizer: ChatTokenizer
    engine: Engine
    metrics: Metrics
    most_tokens: int  # new ones, of one answer
    seconds: float  # for a whole request, the queue included
    stall: float  # without a client reading
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.loaded.checkpoint.parent.parent.name

    async def tokenised(self, work: Callable[[], list[int]]) -> list[int]:
        """A prompt's ids. Megabytes of text take a second: not in the event loop. Raises ApiError."""
        async with self.one_at_a_time:
            try:
                ids = await run_in_threadpool(work)
            except UserError as error:
                raise ApiError(400, str(error), param="messages") from None
        try:
            check_prompt(len(ids), self.loaded.config.seq_length)
        except UserError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from None
        return ids


router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine runs."""
    service = _service(request)
    return _json({"status": "ok" if service.engine.alive else "stopped"}, 200 if service.engine.alive else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model, and what a client may ask of it."""
    service = _service(request)
    created = int(service.loaded.checkpoint.stat().st_mtime)
    limits = {"max_model_len": service.loaded.config.seq_length, "max_tokens": service.most_tokens}
    model = {"id": service.name, "object": "model", "created": created, "owned_by": "lumina", **limits}
    return _json({"object": "list", "data": [model]})


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = _service(request)
    conversation = body.conversation()
    ids = await service.tokenised(lambda: service.tokenizer.prompt_ids(conversation))
    return await _answer(service, body, [ids], body.likeliest(), ChatShape, request)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Go on with texts."""
    service, ids = _service(request), list[list[int]]()
    prompts = body.prompts()
    if not 1 <= len(prompts) * body.n <= CHOICES:
        raise ApiError(400, f"1 to {CHOICES} answers can be asked for, prompts times n", param="prompt")
    for prompt in prompts:
        if isinstance(prompt, str):
            ids.append(await service.tokenised(lambda prompt=prompt: service.tokenizer.text_ids(prompt)))  # type: ignore[misc]
        else:
            ids.append(await service.tokenised(lambda prompt=prompt: _only_text(service, prompt)))  # type: ignore[misc]
    return await _answer(service, body, ids, body.logprobs, TextShape, request)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _only_text(service: Service, ids: list[int]) -> list[int]:
    """Token ids from outside are text: control tokens come from the template only."""
    size = service.loaded.config.vocab_size
    forbidden_V = forbidden_tokens(service.tokenizer, size)
    for token in ids:
        if not 0 <= token < size or forbidden_V[token] or token in service.tokenizer.stop_ids:
            raise UserError(f"{token} is not the id of a token of text")
    return ids


async def _answer(
    service: Service,
    body: ChatRequest | CompletionRequest,
    prompts: list[list[int]],
    logprobs: int | None,
    shape_kind: type[Shape],
    request: Request,
) -> Response:
    if body.model is not None and body.model != service.name:
        raise ApiError(404, f"There is no model {body.model!r}: this is {service.name!r}.", "model_not_found", "model")
    if (body.limit() or 0) > service.most_tokens:
        text = f"max_tokens {body.limit()} is more than this server's {service.most_tokens}"
        raise ApiError(400, text, param="max_tokens")
    try:
        sampling = body.sampling(service.most_tokens)
    except UserError as error:
        text = str(error).replace("max_length", "max_tokens")
        raise ApiError(400, text, param=text.split()[0]) from None
    each = [(ids, p * body.n + i) for p, ids in enumerate(prompts) for i in range(body.n)]
    sequences = [Sequence(ids, sampling, number, logprobs) for ids, number in each]
    step = f"step-{service.loaded.step}"
    tokens = sum(map(len, prompts))
    identity = secrets.token_hex(12)
    shape = shape_kind(service.tokenizer, service.name, step, identity, logprobs is not None, tokens)
    heard = listen(service.engine, sequences, service.seconds, request.receive)
    if body.stream:
        first = await anext(heard)  # what is refused is refused with its own status, before a stream begins
        account = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(shape, len(sequences), first, heard, account), service.stall)
    choices: dict[int, Choice] = {}
    async with aclosing(heard):  # type: ignore[type-var]
        async for pieces in heard:
            by_choice(pieces, choices)
    return _json(shape.whole(choices))


async def _events(
    shape: Shape, choices: int, first: list[Piece], heard: AsyncIterator[list[Piece]], account: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. An error after the first word can only be an event."""
    extra = {"usage": None} if account else {}

    def lines(chunks: list[dict[str, Any]]) -> bytes:
        return b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)

    async with aclosing(heard):  # type: ignore[type-var]
        yield lines([chunk | extra for chunk in [*shape.opening(choices), *shape.chunks(first)]])
        try:
            async for pieces in heard:
                chunks = shape.chunks(pieces)
                if chunks:
                    yield lines([chunk | extra for chunk in chunks])
        except ApiError as error:
            if error.status == 499:
                raise
            yield lines([error.body()])
            return
        yield (lines([shape.closing()]) if account else b"") + b"data: [DONE]\n\n"


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _page(file: str) -> Callable[[], Any]:
    content, kind = (ASSETS / file).read_bytes(), _TYPES[Path(file).suffix]

    async def page() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"})

    return page


async def _refused(request: Request, error: Exception) -> Response:
    """Every failure as OpenAI's error object."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if not str(part).isdigit()) or None
        known = first["type"] == "extra_forbidden"
        text = "is not a field that this server knows" if known else first["msg"].removeprefix("Value error, ")
        error = ApiError(400, f"{where or 'The body'}: {text}", None, where)
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail))
    assert isinstance(error, ApiError)
    return error.response()


async def _crashed(request: Request, error: Exception) -> Response:
    return ApiError(500, "The server failed on this request.", "internal_error").response()


def make_app(service: Service) -> FastAPI:
    """The application, without the guard around it."""
    app = FastAPI(title="Lumina", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.include_router(router)
    for path, file in _FILES.items():
        app.get(path)(_page(file))
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(Exception, _crashed)
    return app
