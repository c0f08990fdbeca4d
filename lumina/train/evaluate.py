"""Evaluation: the mean loss over the whole evaluation set, weighted by tokens over all ranks, and the objective's
figures."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from lumina.data import Samples, deal, read_rows
from lumina.train.deepspeed import Engine, Ranks


@torch.no_grad()
def evaluate(
    engine: Engine,
    dataset: Samples,
    micro_batch_size: int,
    ranks: Ranks,
    heartbeat: Callable[[str], None] = lambda what: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, dict[str, float]]:
    """Mean loss in nats per supervised token, or per preference pair, and the means of the objective's figures by name;
    collective. Every rank runs the same number of forward passes (ZeRO-3 gathers weights in each), padded with samples
    of weight zero. `heartbeat` is called before each pass, `progress` after it with the passes done and all of them."""
    totals = torch.zeros(2 + len(engine.figures), dtype=torch.float64, device=engine.device)
    indices = torch.arange(dataset.num_samples).numpy()
    with engine.evaluation():
        shares = deal(indices, ranks.data_rank, ranks.data_world, micro_batch_size)
        for number, share in enumerate(shares, 1):
            heartbeat("evaluation")
            batch = read_rows(dataset, share, ranks.part).torch()
            # Added up where they are: reading each batch's loss would make the host wait for it.
            totals[1:] += engine.loss(batch)
            totals[0] += batch.units
            progress(number, len(shares))
        dist.all_reduce(totals)
    units, *sums = totals.tolist()
    loss, *means = (value / max(1.0, units) for value in sums)
    return loss, dict(zip(engine.figures, means, strict=True))
