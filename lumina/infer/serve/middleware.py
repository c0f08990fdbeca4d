"""Checks before a request is read: the host it names, its key, the size and the time of its body.

An ASGI wrapper (https://asgi.readthedocs.io, HTTP connection scope), since a refusal must come before the body is in
memory and headers must be on every answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumina.infer.serve.endpoint import Endpoint
from lumina.infer.serve.errors import ApiError, shutting_down
from lumina.infer.serve.metrics import Metrics

ARRIVED = "lumina.arrived"  # in the scope: when the request's head did, of time.monotonic()
LOOPBACK = frozenset(["localhost", "127.0.0.1", "[::1]"])
_TELLING = frozenset([b"content-type", b"origin", b"sec-fetch-site"])  # of the body, and that a browser sent it
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    # The page runs its own scripts and talks to its own server. Nothing else, and no markup of a model's making, runs.
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
]


@dataclass(frozen=True)
class Rules:
    """`key` None lets everyone in. `hosts`: names that a request may call this server by; None: any. Bytes, seconds."""

    key: str | None
    hosts: frozenset[str] | None
    body_bytes: int
    body_seconds: float


class RequestChecks:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics, endpoints: Collection[Endpoint]) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics
        self._paths = {endpoint.path for endpoint in endpoints}
        self._open = {endpoint.path for endpoint in endpoints if not endpoint.needs_key}
        self._digest = None if rules.key is None else _digest(rules.key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started, scope[ARRIVED] = False, time.monotonic()

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), *_HEADERS]
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            await self._answered(scope, receive, answer)
        except asyncio.CancelledError:  # the server goes down, and the time for answers that were begun is over
            if not started:
                await shutting_down().response()(scope, receive, answer)

    async def _answered(self, scope: Scope, receive: Receive, answer: Send) -> None:
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            scope = scope if scope["method"] != "POST" else _as_json(scope)
        except ApiError as error:
            await error.response()(scope, receive, answer)
            return

        unread = [body]

        async def again() -> Message:
            if not unread:
                return await receive()  # the client's leaving
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        await self._app(scope, again, answer)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError. A page of another site can make a browser ask this server, by pointing its own name at the
        loopback address; such a request names that host."""
        headers = {name: value for name, value in scope["headers"] if name in (b"host", b"authorization")}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._rules.hosts is not None and name not in self._rules.hosts:
            raise ApiError(403, f"This server is not called {name!r}.", "unknown_host")
        if self._digest is None or scope["path"] in self._open:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Digests are of equal length, so that the time of the comparison tells nothing about the key.
        if kind.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self._digest):
            raise ApiError(401, "The API key is missing or wrong (Authorization: Bearer KEY).", "invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises ApiError when it is too large or too slow."""
        try:
            return await asyncio.wait_for(self._read(receive), self._rules.body_seconds)
        except TimeoutError:
            raise ApiError(408, "The request's body did not arrive in time.", "timeout") from None

    async def _read(self, receive: Receive) -> bytes:
        """A body that is too large is read to some length and thrown away: a client that is still sending would see a
        broken connection instead of the answer."""
        limit, chunks, size = self._rules.body_bytes, list[bytes](), 0
        while size <= 16 * limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            if not message.get("more_body", False):
                break
        if size > limit:
            raise ApiError(413, f"The request's body is larger than {limit} bytes.", "body_too_large")
        return b"".join(chunks)


def _as_json(scope: Scope) -> Scope:
    """The scope of a POST, whose body is said to be JSON where the client did not say what it is (`curl -d` says it is
    a form). Raises ApiError for other types, and for a browser that does not say: a page of another site can make it
    send such bodies without asking this server first, as it must for JSON."""
    given = {name: value for name, value in scope["headers"] if name in _TELLING}
    kind = given.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json")):
        return scope
    if kind not in (b"", b"application/x-www-form-urlencoded") or given.keys() - {b"content-type"}:
        raise ApiError(400, "The body must be JSON, and said to be: Content-Type: application/json.")
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
