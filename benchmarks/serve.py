"""Throughput of `lumina serve` with several clients at once beside one client alone.

    python benchmarks/serve.py [--config debug] [--precision auto] [--clients 8] [--new 96]

A real server on the loopback address with random weights, asked over HTTP by threads that each send one request after
another, all streamed. Rounds alternate, and the best of each is taken, so that another program's burst does not decide.
The last line is the ratio; at least 3 is asked at 8 clients.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="debug")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens, about")
    parser.add_argument("--new", type=int, default=96, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    keep_heap()
    loaded = make_model(options.config, options.precision)
    metrics = Metrics(options.clients)
    batcher = ContinuousBatcher(loaded, options.clients, 64, metrics)
    service = Service(loaded, Tokenizer.load(), batcher, metrics, 2048, 600.0, STALL_SECONDS)
    server = make_server(make_app(service, Rules(None, None, 1 << 20, 30.0)))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    batcher.start()
    thread.start()
    try:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        best = {1: 0.0, options.clients: 0.0}
        for clients in best:
            tokens_per_second(address, clients, options.prompt, 4)  # what is built or cached at first use
        for _ in range(options.repeats):
            for clients in best:
                rate = tokens_per_second(address, clients, options.prompt, options.new)
                best[clients] = max(best[clients], rate)
    finally:
        server.should_exit = True
        thread.join()
        batcher.close()
    kind = str(loaded.model.embedding.weight.dtype).removeprefix("torch.")
    print(f"{options.config}, {kind}, {options.new} new tokens each, {torch.get_num_threads()} threads")
    for clients, rate in best.items():
        print(f"{clients:3} at a time  {rate:8.1f} tokens/s")
    print(f"ratio {best[options.clients] / best[1]:.2f}")


if __name__ == "__main__":
    main()
