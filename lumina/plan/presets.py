"""The table (docs/presets.md) of what the presets take on GPUs: `python -m lumina.plan.presets`.

Each preset sees 20 tokens per parameter once (arXiv:2203.15556), all of them supervised, documents as long as its
context, in steps of half a million tokens, by the fastest way that fits (lumina.plan.search).
"""

from __future__ import annotations

from collections.abc import Iterator

from lumina.config import Config, load
from lumina.config.deepspeed import resolve
from lumina.plan.costs.devices import Cluster, find_device
from lumina.plan.estimate import assumed_data, total_steps
from lumina.plan.search import Candidate, candidates, choose
from lumina.terminal import say

PRESETS = ("debug", "small", "medium", "1b", "large", "3b", "8b")
DEVICES = (("A100 80GB", "a100-80gb"), ("H100", "h100"))
SIZES = ((1, 1), (1, 8), (8, 8))  # nodes, GPUs in each
STEP_TOKENS = 1 << 19
# What is aimed at, for models of 0.4 to 3 billion parameters: not measured, and not what is predicted.
AIM = {"a100-80gb": 0.60, "h100": 0.50}


def fastest(preset: str, gpu: str, nodes: int, each: int) -> tuple[Config, Candidate | None]:
    """The configuration of the run, and the fastest way that fits (None: there is none)."""
    config = load(preset, {}, ["epochs=1"])
    batch = STEP_TOKENS // config.seq_length
    cluster = Cluster(find_device(gpu), nodes, each)
    config = config.replace(global_batch_size=batch, batch_size=1)
    resolved = resolve(config, cluster.world_size, "cuda", bf16_supported=True).config
    data = assumed_data(config, None, None, 1.0)
    return config, choose(candidates(config, cluster, data, batch, resolved.precision), cluster)


def cell(preset: str, gpu: str, nodes: int, each: int) -> str:
    """Tokens/s of the whole cluster, and the time of the run."""
    config, best = fastest(preset, gpu, nodes, each)
    if best is None:
        return "does not fit"
    batch = config.global_batch_size
    assert batch is not None
    hours = total_steps(config, assumed_data(config, None, None, 1.0), batch) * batch * config.seq_length / best.rate
    return f"{best.rate / 1000:,.0f} k/s, {duration(hours / 3600)}"


def mfu_table() -> Iterator[str]:
    """Predicted MFU of each preset by its fastest settings, on one GPU and on 8, beside what is aimed at: Markdown."""
    yield "| preset | parameters | GPUs | tokens/s/GPU | MFU | aim | limited by | settings |"
    yield "|---|---|---|---|---|---|---|---|"
    for preset in PRESETS:
        for _, gpu in DEVICES:
            for each in (1, 8):
                config, best = fastest(preset, gpu, 1, each)
                start = f"| {preset} | {config.num_parameters():,} | {each} {gpu} |"
                if best is None:
                    yield f"{start} does not fit | | | | |"
                    continue
                speed, setup = best.speed, best.setup
                aim = f"{AIM[gpu]:.0%}" if 0.35e9 < config.num_parameters() < 3.5e9 else ""
                by = "host" if speed.host_bound else "device"
                every = f", every {setup.checkpoint_every}. layer recomputed" if setup.checkpoint_every else ""
                yield (
                    f"{start} {best.rate / each:,.0f} | {speed.mfu:.1%} | {aim} | {by} | {best.strategy}, micro-batch "
                    f"{setup.micro_batch} x {setup.accumulation}{every} |"
                )


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
    say("\n".join(table()))
