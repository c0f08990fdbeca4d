"""Loss over the whole evaluation set, weighted by tokens over all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from lumina.data import Samples
from lumina.data.order import deal
from lumina.train.engine import Engine, Ranks


@torch.no_grad()
def evaluate(
    engine: Engine,
    dataset: Samples,
    micro_batch_size: int,
    ranks: Ranks,
    beat: Callable[[str], None] = lambda what: None,
) -> float:
    """Mean loss in nats per supervised token, or per preference pair; collective. Every rank runs the same number of
    forward passes (ZeRO-3 gathers weights in each), padded with samples of weight zero. `beat` is called before each
    pass."""
    engine.ds.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    indices = torch.arange(dataset.num_samples).numpy()
    for share in deal(indices, ranks.rank, ranks.world, micro_batch_size):
        beat("evaluation")
        batch = dataset.batch(share).torch()
        totals += torch.tensor([float(engine.loss(batch)), float(batch.units)], dtype=torch.float64)
    totals = totals.to(engine.device)
    dist.all_reduce(totals)
    engine.ds.train()
    return float(totals[0] / totals[1].clamp(min=1))
