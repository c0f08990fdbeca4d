"""HTTP connections with bounds: how many there are, how many one client has, and how long each may wait for a request.

uvicorn (0.54.0 read) bounds requests (limit_concurrency), the size of a head and idle time between requests. It has no
limit on how long a head may take, nor on connections before their request, and it writes refusals as plain text. What
is missing is here, on its own classes; nothing of the protocol is written again.

A connection waits until a request has come whole, and is busy until it is answered, also where its client has left
before that. When there are too many, the one that has waited longest goes: a client that sends what it has to say is
not hurt by those that send theirs by the byte. Only when all are busy is a new one refused.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import os
import resource
import socket
import time
from collections import defaultdict
from typing import Any, NamedTuple

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lumina.config import UserError
from lumina.infer.serve.errors import ApiError

log = logging.getLogger("lumina")

HEAD_SECONDS = 10.0  # for a request's head to arrive, counted from the connection or the last answer
STALL_SECONDS = 30.0  # without the client reading what was sent
GRACE_SECONDS = 10  # for answers that are being made when the server is told to stop
_MOST, _FEWEST = 1024, 16  # connections
_BURST = 16  # accepted in one turn of the event loop, before any of them is looked at
_SPARE = 32  # beyond the bound, to be told that there are too many
_KEPT = 64  # descriptors for files, pipes and what is opened later
_QUEUE = 1024  # connections that the kernel keeps until they are accepted
_QUIET_SECONDS = 60.0  # a complaint about clients is logged once in so long


class Limits(NamedTuple):
    """Connections in all and of one client; seconds for a request's head, and from a whole request to the end of its
    answer."""

    total: int
    per_client: int
    head: float = HEAD_SECONDS
    answer: float = 3600.0


def limits_for(seconds: float) -> Limits:
    """What this process's limit of open files leaves room for, with `seconds` for a request. Raises UserError."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = _MOST
    if soft != resource.RLIM_INFINITY:
        # Up to four bursts are accepted before the first of them is closed.
        room = min(_MOST, soft - len(os.listdir("/proc/self/fd")) - _KEPT - _SPARE - 4 * _BURST)
    if room < _FEWEST:
        raise UserError(f"the limit of open files is {soft}, too low for a server", "Raise it: `ulimit -n 1024`.")
    return Limits(room, max(_FEWEST, room // 4), answer=seconds + STALL_SECONDS)


class Connections:
    """A server's connections: those that wait, in the order in which they began to, and those that are busy."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: dict[BoundedProtocol, float] = {}
        self._busy: dict[BoundedProtocol, float] = {}
        self._closing: dict[BoundedProtocol, float] = {}
        self._by_client: defaultdict[str, dict[BoundedProtocol, None]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._busy)

    @property
    def busy(self) -> int:
        return len(self._busy)

    def add(self, new: BoundedProtocol) -> bool:
        """Make room for a new connection, and count it; false where there is none."""
        own, fits = self._by_client[new.peer], len(self._busy) < self.limits.total
        if len(own) >= self.limits.per_client:
            fits = fits and sum(one in self._busy for one in own) < self.limits.per_client
            self._drop_oldest(own)
        if len(self) >= self.limits.total and fits:
            self._drop_oldest(self._waiting)
        self._by_client[new.peer][new] = None
        self._waiting[new] = new.loop.time()
        return fits

    def _drop_oldest(self, among: dict[BoundedProtocol, Any]) -> None:
        oldest = next((one for one in among if one in self._waiting), None)
        if oldest is not None:
            self.remove(oldest)
            oldest.transport.abort()

    def remove(self, gone: BoundedProtocol) -> None:
        for held in (self._waiting, self._busy, self._closing):
            held.pop(gone, None)
        own = self._by_client.get(gone.peer)
        if own is not None:
            own.pop(gone, None)
            if not own:
                del self._by_client[gone.peer]

    def note(self, connection: BoundedProtocol, busy: bool, anew: bool = False) -> None:
        """Whether it is busy now; `anew`: it begins to wait for its next request."""
        if connection not in self._waiting and connection not in self._busy:
            return  # it was dropped
        here, there = (self._busy, self._waiting) if busy else (self._waiting, self._busy)
        if anew or connection not in here:
            here.pop(connection, None)
            here[connection] = connection.loop.time()
        there.pop(connection, None)
        if anew:  # the order within a client is that of waiting, too
            own = self._by_client[connection.peer]
            own.pop(connection, None)
            own[connection] = None

    def sweep(self, now: float) -> None:
        """Close those whose time is up."""
        for connection, since in list(self._waiting.items()):
            if now - since < self.limits.head:
                break
            connection.give_up_waiting()
        for connection, since in list(self._busy.items()):
            if now - since < self.limits.answer:
                break
            connection.transport.abort()
        for connection in [*self._waiting, *self._busy]:
            closing = connection.transport.is_closing()  # what was sent last is not read yet
            if closing and now - self._closing.setdefault(connection, now) >= STALL_SECONDS:
                connection.transport.abort()


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    response = ApiError(503, "Too many connections.", "too_many_connections", retry_after=1).response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, whose connections are counted and timed, and whose refusals have the API's form."""

    def __init__(self, connections: Connections, **others: Any) -> None:
        super().__init__(**others)
        self._open, self.peer = connections, ""
        self._answer, self.app = self.app, self._counted
        self._answering, self._gone = 0, False

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._answering += 1  # of pipelined requests two for a moment
        try:
            await self._answer(scope, receive, send)
        finally:
            self._answering -= 1
            if self._gone and not self._answering:
                self._open.remove(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.peer = _client_of(self.client)
        if not self._open.add(self):
            if len(self._open) > self._open.limits.total + _SPARE:
                transport.abort()
            self.app = _too_many

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._gone = True
        if not self._answering:  # else its request, whose body and work are still here, counts as busy until it ends
            self._open.remove(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._open.note(self, self._asked())

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._open.note(self, self._asked(), anew=True)

    def _asked(self) -> bool:
        """Whether a whole request is here that has not been answered."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def give_up_waiting(self) -> None:
        """No head has come in time. A body has a time of its own, and is answered by the application."""
        if self.cycle is not None and not self.cycle.response_complete:
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(ApiError(408, "The request's head did not arrive in time.", "timeout"))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application's own answer has no place any more, which is no failure
            self.cycle.message_event.set()
        self._refuse(ApiError(400, msg))
        self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Write the answer, where one can still be written."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        answer = error.response()
        head = h11.Response(status_code=error.status, headers=[*answer.raw_headers, (b"connection", b"close")])
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


def _client_of(address: tuple[str, int] | None) -> str:
    """What counts as one client: an IPv4 address, or a network of 64 bits, which one machine may have to itself."""
    host = "" if address is None else address[0].partition("%")[0]
    if ":" not in host:
        return host
    found = ipaddress.IPv6Address(host)
    return str(found.ipv4_mapped or ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))


class BoundedServer(uvicorn.Server):
    """uvicorn's server, which accepts connections a few at a time and closes those whose time is up."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.connections = Connections(limits)
        config = uvicorn.Config(
            app,
            http=functools.partial(BoundedProtocol, self.connections),  # type: ignore[arg-type]
            ws="none",
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            backlog=_BURST,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_QUIET)
        self._failed = -_QUIET_SECONDS

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_QUEUE)  # asyncio has one number for this and for a burst
        asyncio.get_running_loop().set_exception_handler(self._failure)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self.connections.sweep(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    def _failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio tells every failure to accept a connection, with a traceback, and goes on by itself."""
        error = context.get("exception")
        if not isinstance(error, OSError) or "socket" not in context:
            loop.default_exception_handler(context)
        elif loop.time() - self._failed >= _QUIET_SECONDS:
            self._failed = loop.time()
            log.warning("no connection can be accepted now: %s", error.strerror)


class _OnceInAWhile(logging.Filter):
    """Lets the same complaint through once in _QUIET_SECONDS: a client must not fill the log."""

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            return True
        now, key = time.monotonic(), str(record.msg)
        if now - self._told.get(key, -_QUIET_SECONDS) < _QUIET_SECONDS:
            return False
        self._told[key] = now
        return True


_QUIET = _OnceInAWhile()
