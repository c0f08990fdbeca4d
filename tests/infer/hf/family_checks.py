"""A family held against transformers' own model of it: its logits, its training, its files and its decoding.

The models are those of tests.infer.hf_models: small, random, with weights so large that soft caps bend the scores, and
windows shorter than the texts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from lumina.infer import export, import_hf, load
from lumina.model import KVCache, Transformer
from tests.infer.hf_models import make_hf
from tests.small_tokenizer import VOCABULARY

STEPS, RATE = 20, 1e-3
LENGTHS = (5, 23, 1, 11)  # of the packed documents


class Checked(NamedTuple):
    """Largest differences, and how many tensors of the export are not those of the import."""

    logits: float
    losses: float
    changed: int
    decoded: float


def check(place: Path, family: str) -> Checked:
    """Make, import, train beside transformers, decode and export one model of a family, in float32."""
    from transformers import AutoModelForCausalLM

    make_hf(place / "hf", family)
    run = import_hf(place / "hf", place / "run")
    ours = load(run, precision="fp32").model
    theirs = AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32).eval()
    ids = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs(ids).logits
        whole = ours(ids, torch.arange(40)[None])
    decoded = decoding_error(ours, ids)
    changed = changed_tensors(run, place)
    return Checked((whole - expected).abs().max().item(), training_error(ours, theirs), changed, decoded)


@torch.no_grad()
def decoding_error(model: Transformer, ids: torch.Tensor) -> float:
    """In float64: two rows of different lengths, filled, continued by several tokens and decoded token by token."""
    model = copy.deepcopy(model).double()
    whole = model(ids, torch.arange(ids.shape[1])[None])
    cache = KVCache(model.config, 2, 40, model.embedding.weight)
    worst = 0.0

    def extend(counts: list[int], decode: bool = False) -> None:
        nonlocal worst
        starts = list(cache.lengths)
        positions = cache.extend([0, 1], counts, decode)
        new = [ids[0, start : start + count] for start, count in zip(starts, counts, strict=True)]
        found = model(torch.cat(new).view(positions.shape), positions, cache=cache)[:, 0]
        wanted = torch.stack([whole[0, length - 1] for length in cache.lengths])
        worst = max(worst, (found - wanted).abs().max().item())

    extend([3, 12])
    extend([9, 4])
    for _ in range(12):
        extend([1, 1], decode=True)
    cache.free(1)
    for _ in range(6):  # one row alone
        start = cache.lengths[0]
        found = model(ids[:, start : start + 1], cache.extend([0], [1], True), cache=cache)[0, 0]
        worst = max(worst, (found - whole[0, start]).abs().max().item())
    return worst


def changed_tensors(run: Path, place: Path) -> int:
    """How many tensors of the export differ from the import's in a bit, a name or a type."""
    before = load_file(place / "hf/model.safetensors")
    dtype = str(next(iter(before.values())).dtype).removeprefix("torch.")
    after = load_file(export(run, place / "out", dtype=dtype).folder / "model.safetensors")
    same = (
        name in after and t.dtype == after[name].dtype and torch.equal(t, after[name]) for name, t in before.items()
    )
    return len(before.keys() ^ after.keys()) + sum(not one for one in same)


def training_error(ours: Transformer, theirs: Any) -> float:
    """Largest difference of the losses of 20 steps of AdamW: documents packed in one row here, one by one there."""
    draw = torch.Generator().manual_seed(6)
    ours.requires_grad_(True).train()
    theirs.train()
    # Of experts: transformers adds no loss of routers unless it is asked to, and its gradients of the logits that were
    # not chosen are rounding, where ours are 0; the epsilon is above that.
    ours.config.router_aux_loss_coef, epsilon = 0.0, 1e-8 if ours.config.experts is None else 1e-5
    settings: dict[str, Any] = {"lr": RATE, "weight_decay": 0.1, "eps": epsilon}
    optimizers = [torch.optim.AdamW(model.parameters(), **settings) for model in (ours, theirs)]
    edges = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    worst = 0.0
    for _ in range(STEPS):
        # Not the first few: transformers' embeddings give the padding token's row no gradient.
        ids = torch.randint(3, VOCABULARY, (1, sum(LENGTHS)), generator=draw)
        targets, weights = ids.roll(-1, 1), torch.rand(1, sum(LENGTHS), generator=draw)
        weights[0, edges[1:] - 1] = 0.0
        weights /= weights.sum()
        losses = [ours(ids, positions, edges.int(), max(LENGTHS), targets, weights), torch.zeros(())]
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            logits = theirs(ids[:, start:end]).logits[0]
            each = torch.nn.functional.cross_entropy(logits, targets[0, start:end], reduction="none")
            losses[1] = losses[1] + (each * weights[0, start:end]).sum()
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            for parameter in optimizer.param_groups[0]["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.to_dense()
            optimizer.step()
        worst = max(worst, abs(losses[0].item() - losses[1].item()))
    return worst
