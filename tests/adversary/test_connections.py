"""Attacks on the server's connections, before any request is read: (what is sent, what must come back)."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lumina.config import UserError
from lumina.infer import Loaded, load
from lumina.infer.serve import Limits, make_server
from lumina.infer.serve.connections import limits_for
from tests.infer.serve.running_server import Running, running, slow, wait_for
from tests.infer.small_models import write_small_run

KEY = "k"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2000, "temperature": 0, "stream": True}
DRIP = None  # in place of what is sent: a byte again and again, for as long as the connection is open

# What is sent, then again and again; the status that must come before the server closes (None: it closes in silence).
SLOW: dict[str, tuple[bytes, bytes | None, int | None]] = {
    "nothing": (b"", None, None),
    "half a head": (b"GET /health HTTP/1.1\r\nHost: loc", None, 408),
    "a head by the byte": (b"GET /health HTTP/1.1\r\nX: ", b"y", 408),
    "headers without end": (b"GET /health HTTP/1.1\r\n", b"X: y\r\n", 408),
    "half a head after an answer": (HEALTH + HEALTH[:20], None, 408),
    "a body by the byte after its refusal": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n", b" ", 401),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", None, 400),
    "a chunk that is none, after its refusal": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"zz\r\n", 401),
    "a chunk that is none": (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", None, 400),
    "a head of 80 kB": (b"GET /health HTTP/1.1\r\nX: " + b"y" * 80_000, None, 400),
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    run = write_small_run(tmp_path_factory.mktemp("runs") / "small", num_layers=1, seq_length=4096)
    return load(run, precision="fp32")


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Running]:
    """Twenty connections, eight of them from one address. A head has time enough."""
    with running(loaded, key=KEY, slots=1, limits=Limits(20, 8, head=60.0)) as started:
        yield started


@pytest.fixture(scope="module")
def hasty(loaded: Loaded) -> Iterator[Running]:
    """Half a second for a head."""
    with running(loaded, key=KEY, slots=1, limits=Limits(20, 8, head=0.5)) as started:
        yield started


def connect(server: Running, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30, source_address=(source, 0))


def until_closed(connection: socket.socket, again: bytes | None) -> bytes:
    """All that comes; `again` is sent before each look."""
    said = b""
    if again is not None:
        connection.settimeout(0.05)
    with suppress(ConnectionError):
        for _ in range(600):
            try:
                if again is not None:
                    connection.sendall(again)
                new = connection.recv(1 << 16)
            except TimeoutError:
                if again is None:
                    raise
                continue
            if not new:
                return said
            said += new
        raise AssertionError("it was never closed")
    return said


@pytest.mark.parametrize("attack", SLOW)
def test_what_waits_for_its_end_is_closed(hasty: Running, attack: str, caplog: pytest.LogCaptureFixture) -> None:
    sent, again, status = SLOW[attack]
    with connect(hasty) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        if status == 401:  # the refusal comes first
            connection.recv(1, socket.MSG_PEEK)
        said = until_closed(connection, again)
    assert [record.message for record in caplog.records if record.exc_info] == []
    if status is None:
        assert said == b""
    elif sent.startswith(HEALTH):
        assert said.count(b"HTTP/1.1 200 ") == 1
    if status is not None and len(sent) < 1 << 16:  # what was not read resets the connection, the answer with it
        head, _, body = said.rpartition(b"\r\n\r\n")
        assert f"HTTP/1.1 {status} ".encode() in head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

    def answers() -> bool:
        """On a machine that stalls, an honest head may come too late here as well."""
        try:
            return hasty.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_for(answers)


def test_refusals_of_the_protocol_do_not_fill_the_log(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    upgrade = HEALTH[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    for _ in range(10):
        for sent in (b"\x00\r\n\r\n", upgrade):
            with connect(server) as connection:
                connection.sendall(sent)
                assert connection.recv(100)
    assert len(caplog.records) <= 3  # three kinds of complaint


def test_many_that_wait_shut_nobody_out(server: Running) -> None:
    """From one address, and from more of them than there is room for."""
    for sources in (["127.0.0.1"] * 60, [f"127.0.0.{2 + i % 50}" for i in range(100)]):
        with ExitStack() as held:
            for source in sources:
                held.enter_context(connect(server, source)).sendall(b"GET / HTTP/1.1\r\nHos")
            assert server.get("/health").status_code == 200
            assert len(server.connections) <= 20


def test_when_all_are_busy_the_refusal_is_the_apis(server: Running) -> None:
    body = json.dumps(LONG).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    asked = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with ExitStack() as held, slow(server.service.loaded):
        for _ in range(8):
            held.enter_context(connect(server)).sendall(asked)
        wait_for(lambda: server.connections.busy == 8)
        refused = server.get("/health")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        held.enter_context(connect(server))  # one that waits is closed for the next, and makes no room
        assert server.get("/health").status_code == 503
        with connect(server, "127.0.0.9") as other:  # a client of its own
            other.sendall(HEALTH)
            assert other.recv(1000).startswith(b"HTTP/1.1 200 ")
    wait_for(server.idle)
    assert server.get("/health").status_code == 200


def test_requests_whose_client_has_left_count_until_they_end() -> None:
    """Else a client could have any number of them, each with its body."""
    begun, going = list[str](), threading.Event()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["client"][0] == "127.0.0.1":
            begun.append(scope["path"])
            while not going.is_set():
                await asyncio.sleep(0.01)
        await Response("ok")(scope, receive, send)

    server = make_server(application, Limits(20, 8))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()

    def ask(source: str, wait: bool = True) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0)) as one:
            one.sendall(HEALTH)
            return one.recv(100) if wait else b""

    try:
        for number in range(8):
            ask("127.0.0.1", wait=False)
            wait_for(lambda: len(begun) == number + 1)  # noqa: B023
        wait_for(lambda: server.server_state.connections == set())
        assert ask("127.0.0.1").startswith(b"HTTP/1.1 503 ")
        assert ask("127.0.0.2").startswith(b"HTTP/1.1 200 ")
        going.set()
        wait_for(lambda: server.connections.busy == 0)
        assert ask("127.0.0.1").startswith(b"HTTP/1.1 200 ")
    finally:
        going.set()
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def open_files(most: int) -> Iterator[None]:
    """A soft limit that leaves room for so many more. It is one of numbers, among which earlier tests may have left
    gaps."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {number for number in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{number}")}
    free = (number for number in itertools.count() if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, most, None)), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


FLOOD = """
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard > 0 else 4096, hard))
port, held = int(sys.argv[1]), []
for number in range(int(sys.argv[2])):
    one = socket.create_connection(("127.0.0.1", port), source_address=(f"127.0.{1 + number // 50}.1", 0))
    one.sendall(b"GET / HTTP/1.1")
    held.append(one)
print("flooded", flush=True)
sys.stdin.read()
"""


@contextmanager
def flood(port: int, count: int) -> Iterator[None]:
    """So many connections that send half a head, from another process."""
    command = [sys.executable, "-I", "-S", "-c", FLOOD, str(port), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "flooded\n"
            yield
        finally:
            child.kill()


def test_connections_stay_below_the_descriptors(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    with open_files(220), running(loaded, limits=limits_for(60.0)) as server, flood(server.port, 500):
        assert server.get("/health").status_code == 200
        assert not caplog.records


def test_a_limit_that_leaves_no_room_is_refused() -> None:
    with open_files(100), pytest.raises(UserError, match="ulimit -n"):
        limits_for(1.0)
    with open_files(300):
        assert 16 <= limits_for(1.0).total <= 300 - 160


def test_failures_to_accept_are_told_once(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as held:
        clients = [held.enter_context(socket.socket()) for _ in range(5)]
        with open_files(0):
            for client in clients:
                client.connect(("127.0.0.1", server.port))
            wait_for(lambda: "no connection can be accepted" in caplog.text)
        for client in clients:  # they are accepted later
            client.settimeout(60)
            client.sendall(HEALTH)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
