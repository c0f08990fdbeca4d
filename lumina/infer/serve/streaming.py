"""Streaming: text crosses from the batcher's thread into the event loop and to the client; its leaving goes back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from lumina.chat import AnswerReader
from lumina.infer.generation.batch import Sequence as Generated
from lumina.infer.serve.batcher import ContinuousBatcher, Delta, GenerationRequest
from lumina.infer.serve.errors import ApiError, shutting_down
from lumina.infer.serve.middleware import wait_for_disconnect


class ClientGoneError(ApiError):
    """Nobody is there to read. The status, which goes to the metrics only, is the customary one."""

    def __init__(self) -> None:
        super().__init__(499, "The client left.")


async def stream_deltas(
    batcher: ContinuousBatcher,
    sequences: list[Generated],
    reader: Callable[[], AnswerReader],
    seconds: float,
    receive: Receive,
    begun: list[int],
    most_calls: int | None,
) -> AsyncIterator[list[Delta]]:
    """Run sequences (see GenerationRequest); yields what has come since the last time, until all have ended. Close it
    (aclosing) when done.

    However it ends, the sequences' slots are free then. Raises ApiError: the queue is full, time is up, the model
    failed, the server is going down, or ClientGoneError.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Delta | ApiError]()

    def deliver(item: Delta | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(queue.put_nowait, item)

    async def watch() -> None:
        await wait_for_disconnect(receive)
        queue.put_nowait(ClientGoneError())

    request = GenerationRequest(sequences, reader, deliver, time.monotonic() + seconds, begun, most_calls)
    batcher.submit(request)
    watcher = asyncio.create_task(watch())
    going = len(sequences)
    try:
        while going:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            deltas = [item for item in items if isinstance(item, Delta)]
            going -= sum(delta.finish is not None for delta in deltas)
            if deltas:
                yield deltas
            for item in items:
                if isinstance(item, ApiError):
                    raise item
    finally:
        watcher.cancel()
        batcher.cancel(request)


def events(bodies: Sequence[dict[str, Any]]) -> bytes:
    """Server-sent events of these bodies."""
    return b"".join(b"data: " + orjson.dumps(body) + b"\n\n" for body in bodies)


class EventStream(StreamingResponse):
    """Server-sent events (HTML standard, section 9.2). A client that does not read for `stall` seconds, or has gone, is
    let go of: the connection is closed without an end mark.

    sse-starlette (3.7.0 read) is not used: importing it replaces uvicorn's signal handler for the whole process and
    ends open streams at SIGTERM at once, where answers here have their grace; it reads `receive` for the client's
    leaving, which `stream_deltas` does already, also for answers that are not streamed; and its send_timeout opens a
    time limit around every send.
    """

    def __init__(self, events: AsyncIterator[bytes], stall: float, headers: dict[str, str] | None = None) -> None:
        headers = {"Cache-Control": "no-store", **(headers or {})}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._stall = events, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        watched = _StallTimer(send, self._stall)
        try:
            async for data in self._events:
                await watched.send({"type": "http.response.body", "body": data, "more_body": True})
            await watched.send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGoneError:
            return
        except asyncio.CancelledError:
            if not watched.stalled:  # the server goes down
                said = events([shutting_down().body()])
                await watched.send({"type": "http.response.body", "body": said, "more_body": False})
        finally:
            watched.stop()
            await self._events.aclose()  # type: ignore[attr-defined]


class _StallTimer:
    """Cancels the task when a send takes longer than `stall` seconds. One timer for a whole stream: a time limit around
    each send would cost as much as the send."""

    def __init__(self, send: Send, stall: float) -> None:
        self._send, self._stall = send, stall
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        self._since: float | None = None
        self.stalled = False
        self._timer = self._loop.call_later(stall, self._look)

    async def send(self, message: Message) -> None:
        self._since = self._loop.time()
        await self._send(message)
        self._since = None

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if self._since is not None and now - self._since >= self._stall and self._task is not None:
            self.stalled = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at((now if self._since is None else self._since) + self._stall, self._look)
