"""`lumina serve` and what it must refuse, survive or give up: bad requests, clients that leave or dawdle, full queues,
time limits, signals. Errors are read by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Message

from lumina.cli import main
from lumina.infer import Loaded, load
from lumina.infer.serve.streaming import EventStream
from tests.infer.serve.running_server import Running, running, slow, wait_for
from tests.infer.small_models import write_small_run

KEY = "open sesame 123"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
LONG: dict[str, Any] = {"messages": HELLO, "max_tokens": 2000, "temperature": 0}  # in `slow`, twenty seconds or more


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("runs") / "small", num_layers=1, seq_length=4096)


@pytest.fixture(scope="module")
def loaded(run: Path) -> Loaded:
    return load(run, precision="fp32")


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Running]:
    """One slot, so that whoever holds it holds up all others; two may wait."""
    with running(loaded, key=KEY, slots=1, queue=2, body_seconds=1.0) as started:
        yield started


def auth(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def still_answers(server: Running) -> None:
    got = server.client(KEY).chat.completions.create(model="small", messages=HELLO, max_tokens=2)
    assert got.usage is not None
    assert got.usage.completion_tokens == 2


@pytest.mark.parametrize("key", ["", "open sesame 124", "open sesame", "ключ"])
def test_without_the_key(server: Running, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    for path in ("/v1/models", "/metrics"):
        answer = server.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in answer.text
    assert server.post(content=b"{", headers=headers).status_code == 401  # before the body is looked at
    assert server.get("/health", headers=headers).status_code == 200


def test_the_client_reads_the_refusal_of_a_key(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        server.client("wrong").chat.completions.create(model="small", messages=HELLO)
    still_answers(server)


@pytest.mark.parametrize(
    ("settings", "says", "param"),
    [
        ({"messages": [{"role": "user", "content": "my dog " * 2100}]}, "context length is 4096", "messages"),
        ({"max_tokens": 0}, "max_tokens 0 is less than 1", "max_tokens"),
        ({"max_completion_tokens": -2}, "max_completion_tokens -2 is less than 1", "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature 2.1 is outside 0 to 2", "temperature"),
        ({"top_p": 1.1}, "top_p 1.1 is outside 0 to 1", "top_p"),
        ({"extra_body": {"top_k": -2}}, "top_k -2 is less than 1", "top_k"),
        ({"extra_body": {"min_p": -1}}, "min_p -1 is outside", "min_p"),
        ({"extra_body": {"repetition_penalty": 9}}, "repetition_penalty 9 is outside", "repetition_penalty"),
        ({"extra_body": {"bestof": 2}}, "bestof: is not a field that this server knows", "bestof"),
        ({"seed": 2**63}, "seed 9223372036854775808 is outside", "seed"),
        ({"n": 17}, "n: Input should be less than or equal to 16", "n"),
        ({"stop": ["x"] * 17}, "stop takes up to 16 texts", "stop"),
        ({"presence_penalty": 0.5}, "presence_penalty: is not supported by this server", "presence_penalty"),
        ({"messages": []}, "messages: List should have at least 1 item", "messages"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages.role: Input should be", "messages.role"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs: Input should be less than", "top_logprobs"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_met(server: Running, settings: dict[str, Any], says: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client(KEY).chat.completions.create(**({"model": "small", "messages": HELLO} | settings))
    assert says in refused.value.message
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_an_overlong_prompt_has_the_code_that_clients_know(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client(KEY).completions.create(model="small", prompt="my dog " * 2100)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as unknown:
        server.client(KEY).chat.completions.create(model="gpt-4", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="2 is not the id of a token of text"):
        server.client(KEY).completions.create(model="small", prompt=[5, 2])


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"messages": 5}', b'{"messages": [{"role": "user"}]}', b"\xff\xfe{}",
     b'{"messages": [{"role": "user", "content": {"a": 1}}]}', b"{" * 5000, b'{"temperature": NaN, "messages": []}'],
)  # fmt: skip
def test_malformed_bodies(server: Running, body: bytes) -> None:
    answer = server.post(content=body, headers={**auth(), "Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["message"]


def test_other_requests_that_no_client_makes(server: Running) -> None:
    assert server.post("/v1/nothing", headers=auth()).json()["error"]["message"] == "Not Found"
    assert server.get("/v1/chat/completions", headers=auth()).status_code == 405
    # A page of another site can send text/plain without asking first: it is not read as JSON.
    assert server.post(content=json.dumps(LONG), headers={**auth(), "Content-Type": "text/plain"}).status_code == 400
    rebound = server.get("/health", headers={"Host": "evil.example"})
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "unknown_host")
    assert server.get("/health", headers={"Host": f"localhost:{server.port}"}).status_code == 200
    still_answers(server)


def test_large_and_slow_bodies(server: Running) -> None:
    large = server.post(json={"messages": [{"role": "user", "content": "x" * 70_000}]}, headers=auth())
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    chunked = server.post(content=(b"x" * 1000 for _ in range(100)), headers=auth())
    assert chunked.status_code == 413
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]
    still_answers(server)


def test_a_cancelled_stream_frees_its_slot(server: Running) -> None:
    cancelled = server.metric('lumina_sequences_total{how="cancelled"}')
    with slow(server.service.loaded):
        stream = server.client(KEY).chat.completions.create(model="small", stream=True, **LONG)
        next(iter(stream))
        assert not server.idle()
        stream.close()
    still_answers(server)  # there is one slot
    assert server.metric('lumina_sequences_total{how="cancelled"}') == cancelled + 1


def test_a_client_that_leaves_frees_its_slot_and_its_place_in_the_queue(server: Running) -> None:
    """A request that is not streamed, and one behind it that waits."""
    cancelled = server.metric('lumina_sequences_total{how="cancelled"}')
    bodies = json.dumps({"model": "small", **LONG}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(bodies)}\r\n\r\n".encode() + bodies
    with slow(server.service.loaded), socket.create_connection(("127.0.0.1", server.port)) as first:
        first.sendall(request)
        wait_for(lambda: server.metric("lumina_sequences_running") == 1)
        with socket.create_connection(("127.0.0.1", server.port)) as second:
            second.sendall(request)
            wait_for(lambda: server.metric("lumina_sequences_waiting") == 1)
    still_answers(server)
    assert server.metric('lumina_sequences_total{how="cancelled"}') == cancelled + 2


def test_a_client_that_does_not_read_holds_up_nobody(server: Running) -> None:
    asked = {"model": "small", "stream": True, "logprobs": True, "top_logprobs": 5, **LONG}
    body = json.dumps(asked).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        deaf.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        still_answers(server)  # behind it in the queue for the one slot
        wait_for(server.idle)


def test_a_connection_that_takes_nothing_is_given_up() -> None:
    """The same one layer below, where a write that does not return can be had for certain."""
    closed, sent = [], []

    async def events() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append(True)

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 3:
            await asyncio.Event().wait()

    async def receive() -> Message:
        raise AssertionError

    asyncio.run(EventStream(events(), stall=0.05)({"type": "http"}, receive, send))
    assert closed == [True]
    assert len(sent) == 3  # no end mark: uvicorn closes the connection


def test_a_full_queue(server: Running) -> None:
    with slow(server.service.loaded), ThreadPoolExecutor(2) as pool:
        stream = server.client(KEY).chat.completions.create(model="small", stream=True, **LONG)
        next(iter(stream))
        waiting = [pool.submit(still_answers, server) for _ in range(2)]
        wait_for(lambda: server.metric("lumina_sequences_waiting") == 2)
        with pytest.raises(openai.RateLimitError) as full:
            still_answers(server)
        assert full.value.code == "queue_full"
        assert full.value.response.headers["retry-after"] == "1"
        stream.close()
        for one in waiting:
            one.result()


def test_time_is_up(loaded: Loaded) -> None:
    with running(loaded, slots=1, timeout=0.4) as server:
        client = server.client()
        endless = {**LONG, "n": 16}
        with pytest.raises(openai.InternalServerError) as late:
            client.chat.completions.create(model="small", **endless)
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        wait_for(server.idle)
        with pytest.raises(openai.APIError, match="was not complete after"):  # in the middle of a stream
            for _ in client.chat.completions.create(model="small", stream=True, **endless):
                pass
        wait_for(server.idle)

        def answered() -> bool:
            """On a machine that stalls, a token may take longer than the limit here, too."""
            try:
                return bool(client.chat.completions.create(model="small", messages=HELLO, max_tokens=1).choices)
            except openai.InternalServerError as error:
                if error.code == "timeout":
                    return False
                raise

        wait_for(answered)


def test_a_model_that_fails_is_reported_and_the_server_lives(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(loaded, slots=2) as server:
        batch = server.service.batcher._batch
        with monkeypatch.context() as broken:
            broken.setattr(batch, "step", lambda: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="The model failed on this request"):
                server.client().chat.completions.create(model="small", messages=HELLO, max_tokens=3)
        got = server.client().chat.completions.create(model="small", messages=HELLO, max_tokens=3)
        assert got.choices[0].finish_reason == "length"
        assert batch.free == 2


def test_stopping_gives_running_answers_their_time(loaded: Loaded) -> None:
    with running(loaded, slots=1) as server:
        stream = server.client().chat.completions.create(model="small", messages=HELLO, max_tokens=60, stream=True)
        told = iter(stream)
        next(told)
        rest: list[Any] = []
        reader = threading.Thread(target=lambda: rest.extend(told))
        reader.start()
    reader.join()  # the server was told to stop while the answer was read
    assert rest[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.APIConnectionError):
        server.client().models.list()


def test_a_shorter_context(loaded: Loaded) -> None:
    with running(loaded, context_length=64) as server:
        client = server.client()
        assert client.models.list().data[0].model_dump()["max_model_len"] == 64
        with pytest.raises(openai.BadRequestError, match="context length is 64"):
            client.chat.completions.create(model="small", messages=[{"role": "user", "content": "my dog " * 60}])
        got = client.chat.completions.create(model="small", messages=HELLO, temperature=0)
    assert got.usage is not None
    assert got.usage.total_tokens <= 64


def test_stopping_under_load_tells_every_client(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    """Thirty clients of answers that outlast the time of grace: an event, or the API's 503, and nothing in the log."""

    def ask(number: int) -> tuple[int, dict[str, Any]]:
        with client.stream("POST", url, json={**LONG, "n": 4, "stream": number % 2 == 0}) as answer:
            lines = answer.read().decode().strip().splitlines()
        return answer.status_code, json.loads(lines[-1].removeprefix("data: "))

    # One client: thirty would take longer to be made than the first answers to end.
    with slow(loaded), httpx.Client(timeout=120) as client, ThreadPoolExecutor(30) as pool:
        with running(loaded, slots=8, queue=200, grace=1) as server:
            url = f"{server.address}/v1/chat/completions"
            asked = [pool.submit(ask, number) for number in range(30)]
            wait_for(lambda: server.metric("lumina_sequences_waiting") == 112)
        told = [one.result() for one in asked]
    assert {status for status, _ in told} <= {200, 503}
    assert {body["error"]["code"] for _, body in told} == {"shutting_down"}
    assert sum(status == 503 for status, _ in told) >= 15  # those that are not streamed
    assert [record.message for record in caplog.records if record.exc_info] == []
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_the_command_and_its_end(run: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "lumina.cli", "serve", str(run), "--port", "0", "--precision", "fp32"]
    environment = {**os.environ, "LUMINA_API_KEY": KEY.replace(" ", "-"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None
            about = child.stdout.readline()
            address = about.split()[-1]
            assert "step 5: http://127.0.0.1:" in about
            client = openai.OpenAI(base_url=f"{address}v1", api_key=KEY.replace(" ", "-"), max_retries=0)
            assert client.chat.completions.create(model="small", messages=HELLO, max_tokens=2).choices
            child.send_signal(number)
            _, errors = child.communicate(timeout=200)
        finally:
            child.kill()
    assert child.returncode == 0, errors
    assert "Traceback" not in errors
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(address.rstrip("/").rsplit(":", 1)[1])))


def test_mistakes_on_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "none"), "--port", "0"]) == 2
    assert main(["serve", str(run), "--port", "0", "--api-key", "pass\tword"]) == 2
    assert "the API key must be printable ASCII" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(run), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err
    assert main(["serve", str(run), "--host", "no.such.host.invalid"]) == 2


def test_open_to_others_without_a_key_is_warned_of(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lumina.infer.serve import server as module

    class Server:
        def run(self, sockets: list[socket.socket]) -> None:
            """Ends at once."""

    monkeypatch.setattr(module, "load", lambda *_: loaded)
    monkeypatch.setattr(module, "make_server", lambda app, limits: Server())
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        for host, key, warned in (("0.0.0.0", None, True), ("0.0.0.0", "k", False), ("127.0.0.1", None, False)):
            caplog.clear()
            assert module.serve("run", key, host=host, port=0) == 0
            assert ("asks for no key" in caplog.text) == warned
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


SHORT = json.dumps({"messages": HELLO, "max_tokens": 2})


@pytest.mark.parametrize("kind", ["", "application/x-www-form-urlencoded", "application/json; charset=utf-8"])
def test_json_whose_kind_is_not_said(server: Running, kind: str) -> None:
    """As `curl -d` sends it."""
    headers = auth() | ({"Content-Type": kind} if kind else {})
    assert server.post(content=SHORT, headers=headers).status_code == 200


@pytest.mark.parametrize("kind", ["", "application/x-www-form-urlencoded", "text/plain"])
@pytest.mark.parametrize("browser", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_a_page_of_another_site_must_ask_first(server: Running, kind: str, browser: dict[str, str]) -> None:
    headers = auth() | browser | ({"Content-Type": kind} if kind else {})
    answer = server.post(content=SHORT, headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]
