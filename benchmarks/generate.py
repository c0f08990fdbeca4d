"""Decoding speed beside transformers' generate: same weights, same prompts, greedy, each with its cache.

    python benchmarks/generate.py [--config debug] [--precision bf16] [--batch 1] [--new 128]

Runs alternate, and the best of each is taken, so that another program's burst does not decide. The last lines are the
ratios: decoding (ours over transformers', more is better) and prefill (ours over a bare forward pass of the same ids in
time, at most 1.1 is asked).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from lumina.chat import Tokenizer
from lumina.config import load
from lumina.infer import Sampling, generate
from lumina.model import KVCache, Transformer, keep_heap
from lumina.model.families import family_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def peer(model: Transformer, dtype: torch.dtype) -> Any:
    """transformers' Llama with the model's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    values = family_of(config).hf_config(config, "float32", 0, 0)
    llama = LlamaForCausalLM(LlamaConfig(**values))
    state = dict(pair for name, p in model.named_parameters() for pair in family_of(config).split(name, p, config))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state)
    return llama.to(dtype).eval()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="debug")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-peer", action="store_true")
    options = parser.parse_args()
    keep_heap()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    dtype = DTYPES[options.precision]
    model = Transformer(load(options.config)).to(dtype).requires_grad_(False).eval()
    tokenizer = Tokenizer.load()
    tokenizer.stop_ids = frozenset()  # every sequence runs to its length, as the peer's does
    prompts = torch.randint(0, 100_000, (options.batch, options.prompt)).tolist()
    sampling = Sampling(temperature=0, max_length=options.new)

    def ours() -> object:
        return generate(model, tokenizer, prompts, sampling)

    tokens = options.batch * options.new
    works: dict[str, Callable[[], object]] = {"lumina": ours}
    if not options.without_peer:
        llama, ids = peer(model, dtype), torch.tensor(prompts)
        mask = torch.ones_like(ids)
        ends = {"min_new_tokens": options.new, "max_new_tokens": options.new, "pad_token_id": 0}
        works["transformers"] = lambda: llama.generate(ids, attention_mask=mask, do_sample=False, **ends)
    best = dict.fromkeys(works, float("inf"))
    for _ in range(options.repeats):
        for name, work in works.items():
            best[name] = min(best[name], seconds(work))
    threads = torch.get_num_threads()
    shape = f"{options.config}, {options.precision}, batch {options.batch}, {options.prompt}+{options.new} tokens"
    print(f"{shape}, {threads} threads")
    for name, spent in best.items():
        print(f"{name:14} {tokens / spent:8.1f} tokens/s")

    length = model.config.seq_length - 1
    ids = torch.randint(0, 100_000, (1, length))
    positions = torch.arange(length)[None]
    cache = KVCache(model.config, 1, length, model.embedding.weight)

    def bare() -> object:
        return model(ids, positions)

    def prefill() -> object:
        cache.free(0)
        return model(ids, cache.extend([0], [length]), cache=cache)

    passes = {"bare": float("inf"), "prefill": float("inf")}
    for _ in range(options.repeats):
        passes["bare"], passes["prefill"] = min(passes["bare"], seconds(bare)), min(passes["prefill"], seconds(prefill))
    print(f"prefill of {length} tokens: {passes['prefill']:.3f} s, a bare forward pass {passes['bare']:.3f} s")
    if "transformers" in best:
        print(f"decode ratio  {best['transformers'] / best['lumina']:.2f}")
    print(f"prefill ratio {passes['prefill'] / passes['bare']:.2f}")


if __name__ == "__main__":
    main()
