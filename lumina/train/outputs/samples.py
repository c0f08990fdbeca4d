"""Sample answers: the model in training answers fixed prompts, greedily, at each evaluation.

Every rank takes part: under ZeRO-3 each forward pass gathers weights from all of them. Rank 0's choice of a token is
every rank's, so that all make the same passes even where their arithmetic differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from lumina.chat import ChatTokenizer, Conversation, Message
from lumina.model import KVCache
from lumina.train.deepspeed import Engine

log = logging.getLogger("lumina")


def prompts_to_ids(tokenizer: ChatTokenizer, prompts: Sequence[str]) -> dict[str, list[int]]:
    """The ids of prompts, for `sample_answers`. Once, at a start: the files of the tokenizer are read for it, and they
    may be gone later in the run. Raises UserError: the template does not take one."""
    return {prompt: tokenizer.prompt_ids(Conversation((Message("user", prompt),))) for prompt in prompts}


@torch.no_grad()
def sample_answers(
    engine: Engine,
    tokenizer: ChatTokenizer,
    ids: Mapping[str, list[int]],
    max_new_tokens: int,
    heartbeat: Callable[[str], None] = lambda what: None,
) -> list[tuple[str, str]]:
    """(prompt, answer) pairs: greedy, of at most `max_new_tokens` tokens; collective. `ids`: of each prompt; one that
    leaves no room in the model's context is left out. `heartbeat` is called before each pass."""
    context_length = engine.model.config.seq_length
    asked = [prompt for prompt, tokens in ids.items() if len(tokens) < context_length]
    for prompt in ids.keys() - set(asked):
        log.warning("sample prompt of %d tokens fills the context of %d: left out", len(ids[prompt]), context_length)
    if not asked:
        return []
    with engine.evaluation(), _uncompiled(engine):
        said = _greedy(engine, tokenizer, [ids[prompt] for prompt in asked], max_new_tokens, heartbeat)
    return [(prompt, tokenizer.decode(tokens)) for prompt, tokens in zip(asked, said, strict=True)]


def _uncompiled(engine: Engine) -> AbstractContextManager[Any]:
    """No compilation for a few passes of ever new shapes."""
    if not engine.model.compiled:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _greedy(
    engine: Engine,
    tokenizer: ChatTokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    heartbeat: Callable[[str], None],
) -> list[list[int]]:
    """New tokens of each prompt, without the stop token."""
    model, device = engine.model, engine.device
    room = [min(max_new_tokens, model.config.seq_length - len(prompt)) for prompt in prompts]
    capacity = max(len(prompt) + new for prompt, new in zip(prompts, room, strict=True))
    like = torch.empty(0, dtype=model.embedding.weight.dtype, device=device)
    cache = KVCache(model.config, len(prompts), capacity, like)
    forbidden_V = ~torch.from_numpy(tokenizer.allowed_tokens(model.config.vocab_size)).to(device)
    said: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    new_ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)[None]
    positions = cache.extend(going, [len(prompt) for prompt in prompts])
    while True:
        heartbeat("sample answers")
        logits_RV = engine.logits(new_ids, positions, cache=cache)[:, 0]
        chosen_R = logits_RV.masked_fill(forbidden_V, -torch.inf).argmax(-1)
        dist.broadcast(chosen_R, src=0)
        kept = []
        for row, token in zip(going, chosen_R.tolist(), strict=True):
            if token in tokenizer.stop_ids:
                continue
            said[row].append(token)
            if len(said[row]) < room[row]:
                kept.append((row, token))
        if not kept:
            return said
        going = [row for row, _ in kept]
        new_ids = torch.tensor([token for _, token in kept], device=device)[:, None]
        positions = cache.extend(going, [1] * len(going), decode=True)
