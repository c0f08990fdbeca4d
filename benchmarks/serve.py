"""Throughput of `lumina serve` with several clients at once beside one client alone.

    python benchmarks/serve.py [--config debug] [--precision auto] [--clients 8] [--new 96]
    python benchmarks/serve.py --turns 10 [--config debug] [--prompt 160] [--new 48]    one long conversation

A real server on the loopback address with random weights, asked over HTTP by threads that each send one request after
another, all streamed. Rounds alternate, and the best of each is taken, so that another program's burst does not decide.
The last line is the ratio; at least 3 is asked at 8 clients.

--turns: a conversation of so many turns, without the prefix cache and with it, in turn; the time from a request to its
first token at the last turn, and how many tokens of its prompt were cached.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from lumina.chat import Tokenizer
from lumina.config import load
from lumina.infer import Loaded, choose_dtype
from lumina.infer.serve import (
    STALL_SECONDS,
    ContinuousBatcher,
    Metrics,
    PrefixCache,
    Rules,
    Service,
    make_app,
    make_server,
)
from lumina.model import Transformer, keep_heap


def make_model(config: str, precision: str) -> Loaded:
    """Random weights: speed does not depend on what they are. No sequence ends before its length."""
    device, dtype = choose_dtype(precision)
    torch.manual_seed(0)
    model = Transformer(load(config)).to(device, dtype).requires_grad_(False).eval()
    tokenizer = Tokenizer.load()
    tokenizer.stop_ids = frozenset()
    return Loaded(model, tokenizer, Path("experiments/random/checkpoints/step-00000000"), 0)


def ask(address: str, client: int, prompt: int, new: int) -> None:
    """One streamed answer, read to its end."""
    words = " ".join(f"word{client + at}" for at in range(prompt // 2))
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": new, "seed": client, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=600) as response:
        said = response.read()
    assert response.status_code == 200, said
    assert said.endswith(b"data: [DONE]\n\n")


def tokens_per_second(address: str, clients: int, prompt: int, new: int) -> float:
    """New tokens of all clients over the time from the first request to the last answer."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda client: ask(address, client, prompt, new), range(clients)))
    return clients * new / (time.perf_counter() - start)


def turns(address: str, count: int, prompt: int, new: int, number: int) -> tuple[float, int, int]:
    """One conversation. Of its last turn: seconds to the first token, tokens of its prompt, cached ones among them."""
    messages: list[dict[str, str]] = []
    for turn in range(count):
        words = " ".join(f"word{number} of{turn} is{at}" for at in range(prompt // 8))
        messages.append({"role": "user", "content": words})
        body = {"messages": messages, "max_tokens": new, "seed": 1, "stream": True, "logprobs": True}
        body |= {"stream_options": {"include_usage": True}}
        answer, first, usage = "", 0.0, None
        start = time.perf_counter()
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=600) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk["usage"] or usage
                for choice in chunk["choices"]:
                    if choice["logprobs"] and not first:
                        first = time.perf_counter() - start
                    answer += choice["delta"].get("content") or ""
        messages.append({"role": "assistant", "content": answer})
    assert usage is not None
    return first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


@contextmanager
def serving(loaded: Loaded, slots: int, kept: int = 0) -> Iterator[str]:
    """A server's address."""
    metrics = Metrics(slots)
    batcher = ContinuousBatcher(loaded, slots, 64, metrics, PrefixCache(kept, 1 << 30) if kept else None)
    service = Service(loaded, Tokenizer.load(), batcher, metrics, 2048, 600.0, STALL_SECONDS)
    server = make_server(make_app(service, Rules(None, None, 1 << 20, 30.0)))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    batcher.start()
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        batcher.close()


def time_turns(loaded: Loaded, options: argparse.Namespace) -> None:
    kinds = {"without": 0, "with": 32}
    best: dict[str, tuple[float, int, int]] = {}
    for number in range(options.repeats):
        for name, kept in kinds.items():
            with serving(loaded, 1, kept) as address:
                turns(address, 1, 16, 2, 0)  # what is built or cached at first use
                found = turns(address, options.turns, options.prompt, options.new, number)
            best[name] = min(best.get(name, found), found)
    for name, (seconds, size, cached) in best.items():
        print(f"{name:8} {seconds:7.3f} s to the first token of turn {options.turns}, {size} tokens, {cached} cached")
    print(f"ratio {best['without'][0] / best['with'][0]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="debug")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens, about")
    parser.add_argument("--new", type=int, default=96, help="tokens")
    parser.add_argument("--turns", type=int, default=0, help="of one conversation, instead of clients")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    keep_heap()
    loaded = make_model(options.config, options.precision)
    kind = str(loaded.model.embedding.weight.dtype).removeprefix("torch.")
    print(f"{options.config}, {kind}, {options.new} new tokens each, {torch.get_num_threads()} threads")
    if options.turns:
        time_turns(loaded, options)
        return
    with serving(loaded, options.clients) as address:
        best = {1: 0.0, options.clients: 0.0}
        for clients in best:
            tokens_per_second(address, clients, options.prompt, 4)  # what is built or cached at first use
        for _ in range(options.repeats):
            for clients in best:
                rate = tokens_per_second(address, clients, options.prompt, options.new)
                best[clients] = max(best[clients], rate)
    for clients, rate in best.items():
        print(f"{clients:3} at a time  {rate:8.1f} tokens/s")
    print(f"ratio {best[options.clients] / best[1]:.2f}")


if __name__ == "__main__":
    main()
