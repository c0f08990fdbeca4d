"""`lumina serve` under attack: are honest clients answered, and how late.

    python benchmarks/serve_attack.py [--config nano] [--seconds 60] [--clients 8] [--new 32]

A real server on the loopback address with random weights and a key. Honest clients, each with an address of its own,
ask one streamed question after another and know the key, first undisturbed and then beside four attacks, each from one
address and as fast as it goes:

    slow heads      connections that send a head by the byte, up to 400 at a time
    big bodies      1 MB of wrong entries, 3 MB, bodies that never end; with the key and without
    vanishing       whole requests, with the key, whose client leaves at once
    hostile fields  integers of 400 digits, lists of anything, deep nesting, unknown fields, heads that are none

The attackers are another process of the lowest priority: what is measured is the server, not the share of a processor.
Printed are the attempts of each kind, and of the honest requests how many were answered and the median and p99 of their
time. The last line is the ratio of the two p99; at most 2 is asked, and every honest request answered.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import torch

from lumina.chat import Tokenizer
from lumina.config import load
from lumina.infer import Loaded, choose_dtype
from lumina.infer.serve import PrefixCache, Rules, make_app, make_server, make_service
from lumina.model import Transformer, keep_heap

KEY = "key"
PATH = "/v1/chat/completions"
SAYS = b'{"messages":[{"role":"user","content":"hi"}],'


@contextmanager
def serving(config: str, clients: int) -> Iterator[int]:
    """A server's port."""
    device, dtype = choose_dtype("auto")
    torch.manual_seed(0)
    model = Transformer(load(config)).to(device, dtype).requires_grad_(False).eval()
    tokenizer = Tokenizer.load()
    tokenizer.stop_ids = frozenset()
    loaded = Loaded(model, tokenizer, Path("experiments/random/checkpoints/step-00000000"), 0)
    service = make_service(loaded, clients, 64, 2048, 60.0, PrefixCache(8, 1 << 28))
    server = make_server(make_app(service, Rules(KEY, None, 1 << 20, 30.0)))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    service.batcher.start()
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        service.close()


# --- Honest clients -------------------------------------------------------------------------------


def honest(port: int, client: int, end: float, new: int) -> list[tuple[float, bool]]:
    """Seconds of each request, and whether it was answered whole. Connections are kept, as clients do."""
    found = []
    transport = httpx.HTTPTransport(local_address=f"127.0.1.{client + 1}")
    head = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(transport=transport, headers=head, timeout=120) as session:
        while time.monotonic() < end:
            words = f"question {len(found)} of client {client}: " + "what is the old train " * (client + 1)
            body = {"messages": [{"role": "user", "content": words}], "max_tokens": new, "stream": True}
            start = time.monotonic()
            try:
                with session.stream("POST", f"http://127.0.0.1:{port}{PATH}", json=body) as response:
                    whole = response.read().endswith(b"data: [DONE]\n\n") and response.status_code == 200
            except httpx.HTTPError as error:
                print(f"client {client}: {error!r}", flush=True)
                whole = False
            found.append((time.monotonic() - start, whole))
    return found


def measure(port: int, clients: int, seconds: float, new: int) -> list[tuple[float, bool]]:
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(clients) as pool:
        told = pool.map(lambda client: honest(port, client, end, new), range(clients))
        return [one for own in told for one in own]


# --- Attacks --------------------------------------------------------------------------------------


def connect(port: int, source: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(source, 0))


def request(body: bytes, key: bool = True, length: int | None = None) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\n" if key else ""
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def slow_heads(port: int, held: list[socket.socket]) -> None:
    if len(held) < 400:
        held.append(connect(port, "127.0.2.1"))
        held[-1].setblocking(False)
    for one in random.sample(held, min(20, len(held))):
        try:
            one.send(b"G")
        except OSError:
            held.remove(one)
            one.close()


def send(port: int, source: str, data: bytes, read: bool = True) -> None:
    with connect(port, source) as one:
        one.sendall(data)
        if read:
            one.recv(1 << 16)


BIG = [
    request(b'{"messages":' + b"[" + b"0," * 500_000 + b"0]}"),
    request(b'{"messages":[' + b"{}," * 300_000 + b"{}]}", key=False),
    request(b"x" * 3_000_000),
    request(b'{"messages":[', length=900_000),
    request(SAYS + b'"stop":[' + b'"a",' * 200_000 + b'"a"]}'),
]
HOSTILE = [
    *(request(SAYS + b'"%s":1%s}' % (name, b"0" * 400)) for name in (b"top_k", b"seed", b"max_tokens", b"temperature")),
    request(b"[" * 100_000),
    request(SAYS + b",".join(b'"f%d":1' % i for i in range(20_000)) + b"}"),
    request(
        SAYS + b'"tools":[{"type":"function","function":{"name":"f","parameters":' + b'{"a":' * 400 + b"1" + b"}" * 403
    ),
    request(
        SAYS + b'"response_format":{"type":"json_schema","json_schema":{"schema":{"minLength":1' + b"0" * 30 + b"}}}}"
    ),
    b"\x16\x03\x01\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000,
]


def attack(port: int, seconds: float) -> dict[str, int]:
    """All kinds, each in a thread; the attempts of each."""
    end, count = time.monotonic() + seconds, Counter[str]()
    held: list[socket.socket] = []
    vanish = request(SAYS + b'"max_tokens":500,"stream":true}')
    kinds: dict[str, Callable[[], None]] = {
        "slow heads": lambda: slow_heads(port, held),
        "big bodies": lambda: send(port, "127.0.3.1", random.choice(BIG)),
        "vanishing": lambda: send(port, "127.0.4.1", vanish, read=False),
        "hostile fields": lambda: send(port, "127.0.5.1", random.choice(HOSTILE)),
    }

    def go_on(kind: str) -> None:
        while time.monotonic() < end:
            with suppress(OSError):
                kinds[kind]()
            count[kind] += 1
            time.sleep(0.02)

    threads = [threading.Thread(target=go_on, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(count)


def _attackers(pipe: Connection) -> None:
    os.nice(19)
    pipe.send(attack(*pipe.recv()))


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[-1]


def compare(
    port: int,
    clients: int,
    seconds: float,
    new: int,
    begin: Callable[[], object],
    end: Callable[[], dict[str, int]],
) -> dict[str, object]:
    """`begin` and `end` the attacks. Returns the attempts, and of both halves the requests, those that were not
    answered, and the median and p99 of their seconds."""
    measure(port, clients, min(2.0, seconds), new)  # what is built or cached at first use
    alone = measure(port, clients, seconds, new)
    begin()
    beside = measure(port, clients, seconds, new)
    attempts = end()
    found: dict[str, object] = {"attempts": attempts}
    for name, each in (("undisturbed", alone), ("attacked", beside)):
        times = [one for one, _ in each]
        found[name] = {
            "requests": len(each),
            "not answered": sum(not whole for _, whole in each),
            "median": round(statistics.median(times), 3),
            "p99": round(p99(times), 3),
        }
    found["ratio"] = round(p99([one for one, _ in beside]) / p99([one for one, _ in alone]), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nano")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    options = parser.parse_args()
    keep_heap()
    # Forked before there are threads: a new interpreter would have to load torch.
    here, there = multiprocessing.get_context("fork").Pipe()
    attackers = multiprocessing.get_context("fork").Process(target=_attackers, args=(there,))
    attackers.start()
    with serving(options.config, options.clients) as port:
        found = compare(
            port,
            options.clients,
            options.seconds,
            options.new,
            lambda: here.send((port, options.seconds)),
            here.recv,
        )
    attackers.join()
    for name, value in found.items():
        print(name, json.dumps(value))


if __name__ == "__main__":
    main()
