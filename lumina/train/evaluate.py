"""Evaluation: the mean loss over the whole evaluation set, weighted by tokens over all ranks, by position too, and the
objective's figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from lumina.data import Samples, deal, read_rows
from lumina.model import POSITION_BINS
from lumina.train.deepspeed import Engine, Ranks


class Evaluation(NamedTuple):
    """loss: the mean in nats per supervised token, or per preference pair; figures: the means of the objective's, by
    name; by_position: `{"from", "to", "loss", "tokens"}` for each range of how many tokens come before a supervised one
    in its document, where there are any: the shape of `lumina evaluate`. Empty for preference pairs."""

    loss: float
    figures: dict[str, float]
    by_position: list[dict[str, float]]


@torch.no_grad()
def evaluate(
    engine: Engine,
    dataset: Samples,
    micro_batch_size: int,
    ranks: Ranks,
    heartbeat: Callable[[str], None] = lambda what: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluate on all of `dataset`; collective. Every rank runs the same number of forward passes (ZeRO-3 gathers
    weights in each), padded with samples of weight zero. `heartbeat` is called before each pass, `progress` after it
    with the passes done and all of them."""
    count = 2 + len(engine.figures)
    sums = torch.zeros(count + 2 * POSITION_BINS, dtype=torch.float64, device=engine.device)
    totals, by_position_2K = sums[:count], sums[count:].view(2, POSITION_BINS)
    indices = torch.arange(dataset.num_samples).numpy()
    with engine.evaluation():
        shares = deal(indices, ranks.data_rank, ranks.data_world, micro_batch_size)
        for number, share in enumerate(shares, 1):
            heartbeat("evaluation")
            batch = read_rows(dataset, share, ranks.part).torch()
            # Added up where they are: reading each batch's loss would make the host wait for it.
            totals[1:] += engine.loss(batch, by_position=by_position_2K)
            totals[0] += batch.units
            progress(number, len(shares))
        dist.all_reduce(sums)
    units, *found = sums.tolist()
    loss, *means = (value / max(1.0, units) for value in found[: count - 1])
    nats_K, tokens_K = found[count - 1 :][:POSITION_BINS], found[count - 1 :][POSITION_BINS:]
    by_position = [
        {"from": 2**k, "to": 2 ** (k + 1) - 1, "loss": nats / tokens, "tokens": int(tokens)}
        for k, (nats, tokens) in enumerate(zip(nats_K, tokens_K, strict=True))
        if tokens > 0
    ]
    return Evaluation(loss, dict(zip(engine.figures, means, strict=True)), by_position)
