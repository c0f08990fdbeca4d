"""A server in this process, on a free port of the loopback address, and its clients."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from openai import OpenAI

from lumina.infer import Loaded
from lumina.infer.serve import LOOPBACK, Limits, PrefixCache, Rules, Service, make_app, make_server, make_service
from lumina.infer.serve.connections import Connections


@dataclass
class Running:
    service: Service
    address: str
    port: int
    connections: Connections

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=120)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.address + path, timeout=120, **options)

    def post(self, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        return httpx.post(self.address + path, timeout=120, **options)

    def metric(self, line: str) -> float:
        """The value of one line of /metrics, 0 when it is not there."""
        lines = self.service.metrics.text().decode().splitlines()
        return next((float(text.rsplit(" ", 1)[1]) for text in lines if text.rsplit(" ", 1)[0] == line), 0.0)

    def idle(self) -> bool:
        return self.metric("lumina_sequences_running") == self.metric("lumina_sequences_waiting") == 0


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


@contextmanager
def slow(loaded: Loaded, seconds: float = 0.01) -> Iterator[None]:
    """Each of the model's passes takes so long at least: an answer of thousands of tokens then outlasts whatever a test
    does meanwhile, however slow the test's own threads are."""
    hook = loaded.model.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def running(
    loaded: Loaded,
    key: str | None = None,
    slots: int = 4,
    queue: int = 32,
    timeout: float = 60.0,
    max_body: int = 1 << 16,
    body_seconds: float = 10.0,
    max_tokens: int = 2000,
    kept: int = 4,
    limits: Limits | None = None,
    grace: int | None = None,
    context_length: int | None = None,
) -> Iterator[Running]:
    service = make_service(
        loaded, slots, queue, max_tokens, timeout, PrefixCache(kept, 1 << 24) if kept else None, context_length
    )
    server = make_server(make_app(service, Rules(key, LOOPBACK, max_body, body_seconds)), limits)
    if grace is not None:
        server.config.timeout_graceful_shutdown = grace
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    service.batcher.start()
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Running(service, f"http://127.0.0.1:{port}", port, server.connections)
    finally:
        server.should_exit = True
        thread.join()
        service.close()
        listener.close()
