"""Decoding: one sequence, eight alike, and eight of different lengths, greedily through the KV cache."""

from __future__ import annotations

from typing import Any

from day import TINY, Day, timed


def main(day: Day) -> None:
    import torch

    from lumina.chat import Tokenizer
    from lumina.config import load
    from lumina.model import Transformer

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    device, dtype = ("cpu", torch.float32) if day.rehearse else ("cuda", torch.bfloat16)
    config = load("nano", {}, TINY) if day.rehearse else load("1b", {}, [])
    with torch.device(device):
        model = Transformer(config)
    model = model.to(device=device, dtype=dtype).requires_grad_(False).eval()
    tokenizer = Tokenizer.load()
    tokenizer.stop_ids = frozenset()  # every sequence runs to its length
    new = 8 if day.rehearse else 128
    unit = 4 if day.rehearse else 64
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    lengths = {"1": [unit], "8": [unit] * 8, "8 ragged": [unit // 4 * (n + 1) for n in range(8)]}
    for name, prompts in lengths.items():
        day.attempt(f"batch {name}", lambda n=name, p=prompts: batch(day, n, model, tokenizer, p, new, weights))


def batch(day: Day, name: str, model: Any, tokenizer: Any, lengths: list[int], new: int, weights: int) -> None:
    """Tokens/s of the steps after the prompt, and the weights' bytes read per second: what bounds a small batch."""
    import torch

    from lumina.infer import Sampling, generate

    prompts = [torch.randint(0, 100_000, (length,)).tolist() for length in lengths]
    short, full = (Sampling(temperature=0, max_length=count) for count in (2, new))
    generate(model, tokenizer, prompts, short)  # compiles
    answers: list[Any] = []
    both = [timed(lambda s=s: answers.append(generate(model, tokenizer, prompts, s))) for s in (short, full)]
    step = (both[1] - both[0]) / (new - 2)
    whole = all(len(answer.ids) == new for answer in answers[-1])
    figures = {"tokens_per_second": len(prompts) / step, "weights_gb_per_s": weights / step / 1e9}
    shape = {"prompts": f"{min(lengths)} to {max(lengths)}", "new": new, "ms_a_step": step * 1e3}
    day.check(f"batch {name}", whole, **shape, **figures)
