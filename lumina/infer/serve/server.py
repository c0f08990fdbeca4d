"""HTTP server: loads a run's model, serves until a signal, and shuts down."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from types import FrameType

from starlette.types import ASGIApp

from lumina.chat import STEP_SECONDS, open_tokenizer
from lumina.config import UserError
from lumina.infer.generation.memory import fitting_context, free_memory
from lumina.infer.generation.prefix_cache import PrefixCache
from lumina.infer.loading import Loaded, load
from lumina.infer.serve.app import make_app
from lumina.infer.serve.batcher import ContinuousBatcher
from lumina.infer.serve.connections import STALL_SECONDS, BoundedServer, Limits, limits_for
from lumina.infer.serve.metrics import Metrics
from lumina.infer.serve.middleware import LOOPBACK, Rules
from lumina.infer.serve.service import Service
from lumina.terminal import say

log = logging.getLogger("lumina")

BODY_SECONDS = 30.0  # for a request's body to arrive


def serve(
    run: str,
    key: str | None,
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: str = "auto",
    slots: int = 8,
    queue: int = 64,
    max_tokens: int = 2048,
    timeout: float = 300.0,
    max_body: int = 1 << 20,
    prefix_cache: int = 32,
    prefix_cache_bytes: int = 1 << 30,
    context_length: int | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Raises UserError: no such run, address taken, a bad key."""
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise UserError("the API key must be printable ASCII without spaces at its ends", "`openssl rand -hex 32`")
    listener, limits = _listen(host, port), limits_for(timeout)
    try:
        prefixes = PrefixCache(prefix_cache, prefix_cache_bytes) if prefix_cache else None
        loaded = load(run, precision, min(timeout, STEP_SECONDS))
        service = make_service(loaded, slots, queue, max_tokens, timeout, prefixes, context_length)
        address = _address(listener)
        open_to = _loopback(listener.getsockname()[0])
        if key is None and not open_to:
            log.warning("%s can be reached from other machines and asks for no key: set LUMINA_API_KEY", address)
        rules = Rules(key, LOOPBACK if open_to else None, max_body, BODY_SECONDS)
        server = make_server(make_app(service, rules), limits)
        # uvicorn stops at these by itself and then raises them again for whoever handled them before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stopping)
        service.batcher.start()
        try:
            say(f"{service.loaded.checkpoint}, step {service.loaded.step}: {address}", flush=True)
            server.run([listener])
        finally:
            service.close()
    finally:
        listener.close()
    log.info("stopped")
    return 0


def make_service(
    loaded: Loaded,
    slots: int,
    queue: int,
    max_tokens: int,
    timeout: float,
    prefixes: PrefixCache | None = None,
    context_length: int | None = None,
) -> Service:
    """The model's batcher, not yet started, and what the endpoints need. Without a `context_length` it is the model's,
    or what fits into the free memory. Raises UserError: it does not."""
    length = fitting_context(loaded, slots, context_length, free_memory(loaded.model.embedding.weight.device))
    metrics = Metrics(slots)
    batcher = ContinuousBatcher(loaded, slots, queue, metrics, prefixes, length)
    own = loaded.tokenizer
    tokenizer = open_tokenizer(own.folder, own.chat_template, min(timeout, STEP_SECONDS))  # a second one: see Service
    return Service(loaded, tokenizer, batcher, metrics, max_tokens, timeout, STALL_SECONDS)


def make_server(app: ASGIApp, limits: Limits | None = None) -> BoundedServer:
    """`limits`: of connections; None: those that this process has room for."""
    return BoundedServer(app, limits_for(300.0) if limits is None else limits)


def _stopping(number: int, frame: FrameType | None) -> None:
    """The signal was heard: uvicorn is done by then."""


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded: a taken port is found at once. Raises UserError."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(where[:2], family=family)
    except OSError as error:
        raise UserError(f"cannot listen at {host}, port {port}: {error.strerror}", "Choose another --port.") from None


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
