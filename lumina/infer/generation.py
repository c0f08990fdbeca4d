"""Generation: prefill the prompts in one pass, then one token per sequence and pass until each has stopped.

Shape suffixes: R sequences still going, V vocabulary.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from lumina.config import UserError
from lumina.infer.sampling import Sampling, choose, generator
from lumina.infer.voice import Voice
from lumina.model import Transformer
from lumina.model.cache import KVCache
from lumina.model.decode import Decoder

Finish = Literal["stop", "length", "window"]
"""Why a sequence ended: its stop token, max_length, or the model's window (seq_length) being full."""


@dataclass
class Answer:
    """The new tokens of one sequence, without the stop token."""

    ids: list[int] = field(default_factory=list)
    finish: Finish | None = None


def check_prompt(length: int, window: int) -> None:
    """Raise UserError when a prompt leaves no room for an answer."""
    if not 1 <= length < window:
        raise UserError(
            f"the prompt has {length} tokens, and the model's window is {window}",
            "Shorten it: the prompt and the answer share the window (seq_length).",
        )


@torch.inference_mode()
def stream(
    model: Transformer,
    voice: Voice,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Iterator[list[tuple[int, int]]]:
    """Generate for a batch of prompts of any lengths.

    Yields after every pass the new tokens as (sequence, id) pairs, the stop token included: a sequence ends with it, at
    max_length tokens, or when prompt and answer fill the model's window.

    Raises:
        UserError: a prompt that fills the window; a model whose weights are not finite.
    """
    window = model.config.seq_length
    for prompt in prompts:
        check_prompt(len(prompt), window)
    weight = model.embedding.weight
    forbidden_V = voice.forbidden(model.config.vocab_size).to(weight.device)
    room = [min(sampling.max_length, window - len(prompt)) for prompt in prompts]
    capacity = max(len(prompt) + new for prompt, new in zip(prompts, room, strict=True))
    cache = KVCache(model.config, len(prompts), capacity, weight)
    generators = [generator(sampling, sequence) for sequence in range(len(prompts))]
    going = list(range(len(prompts)))
    decoder, k = Decoder(model, cache, forbidden_V), 1 if sampling.greedy else sampling.top_k
    new_ids = torch.tensor([token for prompt in prompts for token in prompt], device=weight.device)[None]
    positions = cache.extend(going, [len(prompt) for prompt in prompts])
    kept_Rk, ids_Rk = decoder.largest(model(new_ids, positions, cache=cache)[:, 0], k)
    while True:
        if not kept_Rk[:, 0].isfinite().all():
            raise UserError("the model's logits are not finite", "Its training diverged: use an earlier checkpoint.")
        chosen = choose(kept_Rk, ids_Rk, sampling, [generators[sequence] for sequence in going]).tolist()
        yield list(zip(going, chosen, strict=True))
        for sequence in going:
            room[sequence] -= 1
        kept = [
            (s, token) for s, token in zip(going, chosen, strict=True) if token not in voice.stop_ids and room[s] > 0
        ]
        if not kept:
            return
        going = [sequence for sequence, _ in kept]
        new_ids = torch.tensor([token for _, token in kept], device=weight.device)[:, None]
        kept_Rk, ids_Rk = decoder.step(new_ids, going, k)


def generate(model: Transformer, voice: Voice, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
    """Answers to a batch of prompts. See `stream`."""
    answers = [Answer() for _ in prompts]
    for new in stream(model, voice, prompts, sampling):
        for sequence, token in new:
            answer = answers[sequence]
            if token in voice.stop_ids:
                answer.finish = "stop"
            else:
                answer.ids.append(token)
    for answer in answers:
        if answer.finish is None:
            answer.finish = "length" if len(answer.ids) == sampling.max_length else "window"
    return answers


def speak(model: Transformer, voice: Voice, prompt: list[int], sampling: Sampling, answer: Answer) -> Iterator[str]:
    """Generate for one prompt, yielding text as it is there. `answer` is filled in on the way, so that a caller who
    stops listening still knows what was said. Raises UserError when the prompt fills the window."""
    text = voice.text_stream()
    for ((_, token),) in stream(model, voice, [prompt], sampling):
        if token in voice.stop_ids:
            answer.finish = "stop"
            break
        answer.ids.append(token)
        yield text.push(token)
    if answer.finish is None:
        answer.finish = "length" if len(answer.ids) == sampling.max_length else "window"
    yield text.end()


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than line feed and tab become U+FFFD."""
    safe = (c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
    return "".join(safe)
