"""The README's table of what the presets take on GPUs: `python -m lumina.plan.presets`.

Each preset sees 20 tokens per parameter once (arXiv:2203.15556), all of them learned from, documents as long as its
window, in steps of half a million tokens, by the fastest way that fits (lumina.plan.search).
"""

from __future__ import annotations

from collections.abc import Iterator

from lumina.config import load
from lumina.config.deepspeed import resolve
from lumina.plan.devices import Cluster, find_device
from lumina.plan.estimate import assumed_data, total_steps
from lumina.plan.search import candidates, choose

PRESETS = ("debug", "small", "medium", "large")
DEVICES = (("A100 80GB", "a100-80gb"), ("H100", "h100"))
SIZES = ((1, 1), (1, 8), (8, 8))  # nodes, GPUs in each
STEP_TOKENS = 1 << 19


def cell(preset: str, gpu: str, nodes: int, each: int) -> str:
    """Tokens/s of the whole cluster, and the time of the run."""
    config = load(preset, {}, ["epochs=1"])
    batch = STEP_TOKENS // config.seq_length
    cluster = Cluster(find_device(gpu), nodes, each)
    config = config.replace(global_batch_size=batch, batch_size=1)
    resolved = resolve(config, cluster.world_size, "cuda", bf16_supported=True).config
    data = assumed_data(config, None, None, 1.0)
    best = choose(candidates(config, cluster, data, batch, resolved.precision), cluster)
    if best is None:
        return "does not fit"
    hours = total_steps(config, data, batch) * batch * config.seq_length / best.rate / 3600
    return f"{best.rate / 1000:,.0f} k/s, {duration(hours)}"


def duration(hours: float) -> str:
    """In the unit that leaves two digits or so."""
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def table() -> Iterator[str]:
    """The lines, in Markdown."""
    titles = [f"{nodes * each} {name}" for name, _ in DEVICES for nodes, each in SIZES]
    yield f"| preset | {' | '.join(titles)} |"
    yield "|---|" + "---|" * len(titles)
    for preset in PRESETS:
        cells = [cell(preset, gpu, nodes, each) for _, gpu in DEVICES for nodes, each in SIZES]
        yield f"| {preset} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
