"""The table (docs/long-context.md) of the longest rows of the 8b preset on H100s: `python -m lumina.plan.windows`.

One sample a micro-batch, bfloat16, ZeRO 3 over all ranks, which all share the row; every layer recomputed, the
feed-forward in tiles of 8,192 tokens, attention in as many groups of heads as there can be, recomputed layers' inputs
on the host. One GPU keeps weights and optimizer on the host too. By memory alone: attention over such a row takes its
time.
"""

from __future__ import annotations

from collections.abc import Iterator

from lumina.config import Config, load
from lumina.plan.costs.devices import find_device
from lumina.plan.costs.memory import PeakMemory, peak_memory
from lumina.plan.costs.setup import Buffers, Setup
from lumina.plan.search import buffers_for
from lumina.terminal import say

GPUS = {1: 500_000, 8: 3_700_000, 32: 15_000_000}  # and what arXiv:2506.13996 reports on so many
TILE = 8192
STEP = 64 * 32  # tokens: whole tiles of rows on each of 32 ranks


def peak(tokens: int, gpus: int) -> PeakMemory:
    """Memory of one rank at that length of the row."""
    config: Config = load("8b").replace(seq_length=tokens)
    alone = gpus == 1
    setup = Setup(
        1,
        1,
        gpus,
        "bf16",
        3,
        offload_optimizer=alone,
        offload_params=alone,
        checkpoint_every=1,
        sequence_parallel=gpus,
        mlp_tile=TILE,
        head_groups=config.fitting_head_groups(gpus)[-1],
        activation_offloading=True,
    )
    buffers: Buffers = buffers_for(config)
    return peak_memory(config, setup, buffers, find_device("h100").memory)


def longest(gpus: int) -> int:
    """Tokens of the longest row that fits."""
    memory = find_device("h100").memory
    low, high = 1, 1 << 15  # in steps: one fits, 64 M tokens do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle * STEP, gpus).device <= memory else (low, middle)
    return low * STEP


def table() -> Iterator[str]:
    """The lines, in Markdown."""
    yield "| H100 80GB | groups | longest row | arXiv:2506.13996 | activations | states | other | host | highest in |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for gpus, published in GPUS.items():
        tokens = longest(gpus)
        found = peak(tokens, gpus)
        states = found.weights + found.gathered + found.gradients + found.master + found.moments
        other = found.output + found.buffers + found.margin
        sizes = [f"{size / 1e9:.1f} GB" for size in (found.activations, states, other, found.host)]
        groups = load("8b").fitting_head_groups(gpus)[-1]
        cells = [str(gpus), str(groups), f"{tokens:,}", f"{published:,}", *sizes, found.moment]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    say("\n".join(table()))
