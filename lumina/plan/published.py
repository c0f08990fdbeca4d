"""The speed model against published runs: `python -m lumina.plan.published > docs/plan.md` writes the document.

The matrix-product shares of devices.yaml come from llm-foundry's single-node rows; here stand multi-node rows of it,
from 125M to 70B and with the two worst of all 67 among them (70B on 64 and 1B on 32 A100 40 GB), and other trainers.
What differs from Lumina is said per trainer, not per run: how many times more bytes its element-wise code moves
(eager code runs norm, activation and residual as separate passes: 2.8, a round number within what the same
single-node fits gave; compiled code as fused as ours: 1), and what its attention kernel reaches (llm-foundry used
FlashAttention 1 in Triton: 0.31 of an A100's peak and 0.18 of an H100's, from the same fits). Neither trainer copies
attention's values out of a joint projection, as Lumina does since those fits.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from lumina.config import ModelConfig, load
from lumina.plan.costs.devices import Cluster, find_device
from lumina.plan.costs.launches import BACKWARD, FEED_FORWARD, FORWARD, LaunchCost
from lumina.plan.costs.memory import CONTEXT, FRAGMENTATION
from lumina.plan.costs.setup import Setup
from lumina.plan.costs.speed import predict
from lumina.plan.estimate import assumed_data, estimate_run
from lumina.plan.presets import PRESETS, mfu_table
from lumina.terminal import say

LLM_FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md at 8c8dd48"
TORCHTITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md at b5bcd76 (500 W boards)"
TORCHTITAN_A100 = "torchtitan, docs/performance.md of 2024"

EAGER, COMPILED = 2.8, 1.0
FLASH_1 = {"a100-40gb": 0.31, "a100-80gb": 0.31, "h100": 0.18}


def _mpt(hidden: int, layers: int, heads: int, seq_length: int = 2048) -> ModelConfig:
    """An MPT model: multi-head, a 4x feed-forward of two matrices (as many elements as 8/3 with three)."""
    return ModelConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        seq_length=seq_length,
        vocab_size=50368,
        intermediate_size=8 * hidden // 3,
    )


def _llama3(hidden: int, layers: int, heads: int, feed_forward: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        seq_length=8192,
        vocab_size=128256,
        intermediate_size=feed_forward,
        tie_word_embeddings=False,
    )


MODELS = {
    "MPT 125M": _mpt(768, 12, 12),
    "MPT 1B": _mpt(2048, 24, 16),
    "MPT 3B": _mpt(2560, 32, 20),
    "MPT 7B": _mpt(4096, 32, 32),
    "MPT 13B": _mpt(5120, 40, 40),
    "MPT 30B": _mpt(7168, 48, 56),
    "MPT 70B": _mpt(8192, 80, 64),
    "Llama 3 8B": _llama3(4096, 32, 32, 14336),
    "Llama 3 70B": _llama3(8192, 80, 64, 28672),
}


@dataclass(frozen=True)
class PublishedRun:
    """A published run. rate: tokens/s of one GPU. recompute: every nth layer; torchtitan's selective recomputation,
    which saves every other matrix product, counts as every second layer."""

    model: str
    device: str
    gpus: int
    micro_batch: int
    recompute: int
    rate: float
    source: str
    elementwise_factor: float
    stage: int = 3
    accumulation: int = 1

    def predicted(self) -> float:
        """Tokens/s of one GPU as `predict` has it."""
        cluster = Cluster(find_device(self.device), self.gpus // 8, 8)
        setup = Setup(
            self.micro_batch, self.accumulation, self.gpus, "bf16", self.stage, checkpoint_every=self.recompute
        )
        attention = FLASH_1[self.device] if self.source == LLM_FOUNDRY else None
        speed = predict(
            MODELS[self.model],
            setup,
            cluster,
            elementwise_factor=self.elementwise_factor,
            attention=attention,
            values_copied=False,
        )
        return speed.tokens_per_second / self.gpus

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted() / self.rate - 1


def _foundry(
    model: str,
    device: str,
    gpus: int,
    micro_batch: int,
    recompute: int,
    rate: float,
    stage: int = 3,
    accumulation: int = 1,
) -> PublishedRun:
    return PublishedRun(model, device, gpus, micro_batch, recompute, rate, LLM_FOUNDRY, EAGER, stage, accumulation)


RUNS = (
    _foundry("MPT 125M", "a100-40gb", 128, 26, 0, 123936),
    _foundry("MPT 1B", "a100-40gb", 64, 10, 0, 19001),
    _foundry("MPT 1B", "a100-40gb", 32, 10, 0, 15555),
    _foundry("MPT 70B", "a100-40gb", 64, 2, 1, 276),
    _foundry("MPT 3B", "a100-40gb", 128, 6, 0, 9538),
    _foundry("MPT 7B", "a100-40gb", 64, 18, 1, 3665),
    _foundry("MPT 13B", "a100-40gb", 128, 16, 1, 1972),
    _foundry("MPT 30B", "a100-40gb", 128, 6, 1, 865),
    _foundry("MPT 70B", "a100-80gb", 64, 8, 1, 410, accumulation=4),
    _foundry("MPT 1B", "h100", 512, 12, 0, 39837, stage=2),
    _foundry("MPT 3B", "h100", 128, 8, 0, 23422, stage=2),
    _foundry("MPT 7B", "h100", 256, 6, 0, 10119),
    _foundry("MPT 13B", "h100", 32, 2, 0, 4811),
    _foundry("MPT 13B", "h100", 512, 16, 1, 4952),
    _foundry("MPT 30B", "h100", 16, 10, 1, 2263, accumulation=3),
    _foundry("MPT 70B", "h100", 128, 8, 1, 1058),
    PublishedRun("Llama 3 8B", "a100-80gb", 64, 1, 2, 2973, TORCHTITAN_A100, EAGER),
    PublishedRun("Llama 3 70B", "a100-80gb", 64, 1, 1, 331, TORCHTITAN_A100, EAGER),
    PublishedRun("Llama 3 8B", "h100", 8, 2, 2, 5762, TORCHTITAN, EAGER),
    PublishedRun("Llama 3 8B", "h100", 8, 2, 2, 6667, TORCHTITAN, COMPILED),
    PublishedRun("Llama 3 8B", "h100", 128, 2, 2, 6514, TORCHTITAN, COMPILED),
)


def median_error() -> float:
    """The median of the absolute errors over all cases."""
    return statistics.median(abs(run.error) for run in RUNS)


def table() -> str:
    """The comparison as Markdown."""
    lines = [
        "| model | cluster | recomputed | published tokens/s/GPU | predicted | error | source |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = {0: "no", 1: "every layer", 2: "half"}
    for run in RUNS:
        code = "compiled" if run.elementwise_factor == COMPILED else "eager"
        lines.append(
            f"| {run.model} | {run.gpus} {run.device} | {kinds[run.recompute]} | {run.rate:,.0f} | "
            f"{run.predicted():,.0f} | {run.error:+.1%} | {run.source}, {code} |"
        )
    lines += ["", f"Median absolute error over {len(RUNS)} runs: {median_error():.1%}."]
    return "\n".join(lines)


def presets_table() -> str:
    """The presets on one, 8 and 64 of two devices, at their default batch, trained on 20 tokens per parameter."""
    lines = [
        "| preset | cluster | ZeRO | memory a rank | tokens/s | MFU | for 20 tokens per parameter |",
        "|---|---|---|---|---|---|---|",
    ]
    for preset in PRESETS:
        config = load(preset)
        data = assumed_data(config, None, None, 1.0)
        for device in ("a100-80gb", "h100"):
            for nodes, each in ((1, 1), (1, 8), (8, 8)):
                run = estimate_run(config, Cluster(find_device(device), nodes, each), data)
                hours = f"{run.seconds / 3600:,.1f} h, {run.gpu_hours:,.0f} GPU-hours"
                if not run.fits:
                    hours = "does not fit"
                lines.append(
                    f"| {preset} | {run.cluster} | {run.setup.stage} | {run.memory.device / 1e9:.1f} GB | "
                    f"{run.speed.tokens_per_second:,.0f} | {run.speed.mfu:.0%} | {hours} |"
                )
    return "\n".join(lines)


DOCUMENT = """\
# Estimates, and how far to trust them

Made by `python -m lumina.plan.published > docs/plan.md`; do not edit by hand.

## Memory

Weights, master weights and Adam's moments are what DeepSpeed allocates, to the byte, for ZeRO 0 to 3 at one, two and
four ranks, and at 4,096 by a process group whose collectives do nothing, in bf16 and float32
(`tests/plan/costs/test_memory.py` runs it). Activations are those that autograd keeps for Lumina's
fused operators, held within 1% against the real model under fake tensors, and so is all that is alive in a layer's
backward pass (`tests/plan/costs/test_activations.py`), also of ranks that share rows. On top come {context:.1f} GB for
the CUDA context and NCCL, and {fragmentation:.0%} for fragmentation: assumptions, not measurements.

## Speed against published runs

No row was fitted by itself, and none of these entered the fits; `lumina/plan/published.py` says what did, how rows were
chosen, and where each figure was published. Single runs are off by up to 40%; the stated uncertainty of 25% covers most
of them, not all. The H100s of torchtitan's report ran at 500 W instead of 700 W, which the model does not know.
Figures for offload to the host rest on assumptions that no run here has tested.

{published}

## Launches

A step cannot be faster than the host queues it: {forward} launches a layer forward and {backward} backward, of which
{feed_forward[0]} and {feed_forward[1]} in the feed-forward, that tiles of tokens (`--mlp-tile-tokens`) make as often as
there are tiles, and the {feed_forward[0]} once more; at the host time of one layer that
`python benchmarks/host_time.py` measures without a card ({forward_us:.0f} and {backward_us:.0f} us on one core of an
Intel Xeon; `--host-us F B` gives another host's). It is a floor: no wait of the
host is in it, no hook of DeepSpeed's, and nothing that `--compile` saves. It moves none of the published runs above:
their models and micro-batches are large. Small models at small micro-batches wait for the host: `debug` as it stands on
one H100 is predicted at {share:.0%} of what the card alone would do.

Predicted, not measured: no step of Lumina has run on these cards yet. By the fastest settings that fit, with contexts
full of supervised tokens and half a million tokens a step. The aim is what published trainers suggest is possible
(51.6% to 64.2% on 8 A100, 41.8% to 46.4% on 8 H100: llm-foundry); on the H100 the prediction stays below it, because
the share of peak that matrix products reach ({hopper:.0%}) was fitted to those very runs.

{mfu}

## Time measured on the machine at hand

`lumina estimate-time --measure` against 200 steps after it, as `python benchmarks/measure.py FILE` printed it in 80
minutes. Two cores of an AMD EPYC without AVX-512, float32, 1,024 tokens a process and step in contexts of the preset's
own length, FILE of chitchat-dataset. The aim is 10%. The tenths are the fastest and the slowest tenth of the run's
steps against its mean:

| round | preset | processes | predicted, 200 steps | taken | error | tenths |
|---|---|---|---|---|---|---|
| 1 | nano | 1 | 248 s | 255 s | -2.9% | -10% to +9% |
| 1 | nano | 2 | 542 s | 577 s | -6.2% | -6% to +11% |
| 1 | debug | 1 | 759 s | 754 s | +0.8% | -9% to +7% |
| 1 | debug | 2 | 1763 s | 1699 s | +3.8% | -7% to +6% |

Largest error 6.2%. After it, with `--presets nano`, and largest error 6.3%:

| round | preset | processes | predicted, 200 steps | taken | error | tenths |
|---|---|---|---|---|---|---|
| 1 | nano | 1 | 279 s | 297 s | -6.3% | -9% to +9% |
| 1 | nano | 2 | 621 s | 621 s | -0.1% | -10% to +8% |

Shorter runs are predicted less well here: with two minutes of measuring and contexts of 256 tokens, one a process and
step (`python benchmarks/measure.py FILE --seq-length 256` at commit f673ccc), thirteen of fifteen predictions were
within 10%. The other two, +12.4% and -11.9%, were of nano on one process, whose 200 steps then took 79 s to 107 s. As
the tenths show, the speed moves by as much within a run, and a short one has less time to average that out.

## The presets

As their settings stand. presets.md is of the fastest settings that fit (`python -m lumina.plan.presets`).

{presets}
"""


def document() -> str:
    """All of docs/plan.md."""
    cost, config = LaunchCost(), load("debug")
    rates = [
        estimate_run(
            config, Cluster(find_device("h100"), launch_cost=each), assumed_data(config, None, None, 1.0)
        ).speed
        for each in (cost, LaunchCost(0.0, 0.0))
    ]
    return DOCUMENT.format(
        context=CONTEXT / 1e9,
        fragmentation=FRAGMENTATION,
        published=table(),
        presets=presets_table(),
        forward=FORWARD,
        backward=BACKWARD,
        feed_forward=FEED_FORWARD,
        forward_us=cost.forward * 1e6,
        backward_us=cost.backward * 1e6,
        share=rates[0].tokens_per_second / rates[1].tokens_per_second,
        hopper=find_device("h100").matmul,
        mfu="\n".join(mfu_table()),
    )


if __name__ == "__main__":
    say(document(), end="")
