"""Between a request and the engine: pieces cross from its thread into the event loop, a client's leaving goes back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lumina.infer.batch import Sequence
from lumina.infer.serve.engine import Engine, Job, Piece
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.guard import left


class ClientGoneError(ApiError):
    """Nobody is there to hear. The status, which goes to the metrics only, is the customary one."""

    def __init__(self) -> None:
        super().__init__(499, "The client left.")


async def listen(
    engine: Engine, sequences: list[Sequence], seconds: float, receive: Receive
) -> AsyncIterator[list[Piece]]:
    """Run sequences; yields what has come since the last time, until all have ended. Close it (aclosing) when done.

    However it ends, the sequences' slots are free then. Raises ApiError: the queue is full, time is up, the model
    failed, the server is going down, or ClientGoneError.
    """
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[Piece | ApiError]()

    def deliver(item: Piece | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(heard.put_nowait, item)

    async def watch() -> None:
        await left(receive)
        heard.put_nowait(ClientGoneError())

    job = Job(sequences, deliver, time.monotonic() + seconds)
    engine.submit(job)
    watcher = asyncio.create_task(watch())
    going = len(sequences)
    try:
        while going:
            items = [await heard.get()]
            while not heard.empty():
                items.append(heard.get_nowait())
            pieces = [item for item in items if isinstance(item, Piece)]
            going -= sum(piece.finish is not None for piece in pieces)
            if pieces:
                yield pieces
            for item in items:
                if isinstance(item, ApiError):
                    raise item
    finally:
        watcher.cancel()
        engine.cancel(job)


class EventStream(StreamingResponse):
    """Server-sent events (HTML standard, section 9.2). A client that does not read for `stall` seconds, or has gone, is
    let go of: the connection is closed without an end mark."""

    def __init__(self, events: AsyncIterator[bytes], stall: float) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"}, media_type="text/event-stream")
        self._events, self._stall = events, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def out(data: bytes, more: bool) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            await asyncio.wait_for(send(message), self._stall)

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await out(data, True)
            await out(b"", False)
        except (ClientGoneError, asyncio.TimeoutError):
            return
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
