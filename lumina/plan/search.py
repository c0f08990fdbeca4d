"""Search over the ways to train a configuration on a cluster: ZeRO stage, hpZ, offload, micro-batch and recomputation;
and where activations do not fit, the ranks that share a row, tiles of the feed-forward and activations on the host.

The global batch is kept: accumulation follows from the micro-batch, and where the batch does not divide, the padding of
weight zero counts as time but not as progress. Differences below `NOISE` are less than the model can tell, so among the
fastest that fit the one wins that shares, offloads and recomputes least, with the largest micro-batch that leaves some
memory free (more work per kernel launch, which the model does not price).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from lumina.config import Config
from lumina.config.deepspeed import zero_sizes
from lumina.plan.costs.devices import Cluster
from lumina.plan.costs.memory import PeakMemory, peak_memory
from lumina.plan.costs.setup import Buffers, Data, Setup
from lumina.plan.costs.speed import Speed, predict
from lumina.plan.stage import ROOMY

RECOMPUTE = (0, 4, 2, 1)  # every nth layer; 0: none
TILES = (8192, 2048)  # tokens of a tile of the feed-forward; the more, the fewer launches and sums of gradients
NOISE = 0.02


@dataclass(frozen=True)
class Candidate:
    """One way, and what it would need and do."""

    setup: Setup
    memory: PeakMemory
    speed: Speed
    fits: bool

    @property
    def rate(self) -> float:
        """Tokens/s of the whole cluster, without those of padding."""
        return self.speed.tokens_per_second

    @property
    def strategy(self) -> str:
        """Stage and offload, the choice that the answer explains."""
        eighth = ", gathers of 8 bits" if self.setup.quantized_weights else ""
        if self.setup.hpz:
            return f"ZeRO {self.setup.stage}, hpZ within each node{eighth}"
        if eighth:
            return f"ZeRO {self.setup.stage}{eighth}"
        if not self.setup.offload_optimizer:
            return f"ZeRO {self.setup.stage}"
        what = "optimizer and weights" if self.setup.offload_params else "optimizer"
        return f"ZeRO {self.setup.stage}, {what} on the host"

    @property
    def way(self) -> tuple[int, bool, bool, bool]:
        """What brings activations down beside recomputation: ranks that share a row, whether the feed-forward is in
        tiles, whether attention is in groups of heads, and whether recomputed layers' inputs wait on the host."""
        setup = self.setup
        return setup.sequence_parallel, setup.mlp_tile > 0, setup.head_groups > 1, setup.activation_offloading


def choose(found: list[Candidate], cluster: Cluster) -> Candidate | None:
    """The one to use, or None when nothing fits."""
    fitting = [candidate for candidate in found if candidate.fits]
    if not fitting:
        return None
    fastest = max(candidate.rate for candidate in fitting)

    def preference(candidate: Candidate) -> tuple[int, ...]:
        setup, roomy = candidate.setup, candidate.memory.device <= ROOMY * cluster.device.memory
        recomputed = 0 if not setup.checkpoint_every else 100 // setup.checkpoint_every
        return (
            setup.activation_offloading,
            setup.mlp_tile > 0,
            setup.head_groups > 1,
            setup.sequence_parallel,
            setup.stage,
            setup.quantized_weights,
            setup.hpz,
            setup.offload_optimizer,
            setup.offload_params,
            recomputed,
            not roomy,
            -setup.mlp_tile,
            -setup.micro_batch,
        )

    return min((candidate for candidate in fitting if candidate.rate >= (1 - NOISE) * fastest), key=preference)


def buffers_for(config: Config) -> Buffers:
    """The bucket sizes that "auto" resolves to (lumina.config.deepspeed)."""
    sizes = zero_sizes(config)
    return Buffers(
        sizes["reduce_bucket_size"],
        sizes["stage3_prefetch_bucket_size"],
        sizes["stage3_param_persistence_threshold"],
        live=sizes["stage3_max_live_parameters"],
    )


def search(
    config: Config,
    cluster: Cluster,
    data: Data,
    global_batch: int,
    precision: str,
    stages: tuple[int, ...] = (0, 1, 2, 3),
    quantized: bool = False,
) -> list[Candidate]:
    """Candidates of all ways that are worth trying, fastest first. Ranks share rows where nothing fits in which fewer
    do, and that is where tiles and activations on the host are tried: in place of sharing, and beside it. Where the
    batch has fewer samples than there are ranks, which would then only pad, they share rows too."""
    found: list[Candidate] = []
    for size in _sequence_sizes(config, cluster):
        shared = config.replace(sequence_parallel_size=size)
        found += candidates(shared, cluster, data, global_batch, precision, stages, quantized)
        if any(candidate.fits and candidate.setup.sequence_parallel == size for candidate in found):
            if size * global_batch >= cluster.world_size:
                break
            continue
        for lean in _leaner(shared, precision):
            found += candidates(lean, cluster, data, global_batch, precision, stages, quantized)
    # Without a recomputed layer nothing is offloaded: such a way was there before.
    different = {candidate.setup: candidate for candidate in found}
    return sorted(different.values(), key=lambda candidate: -candidate.rate)


def candidates(
    config: Config,
    cluster: Cluster,
    data: Data,
    global_batch: int,
    precision: str,
    stages: tuple[int, ...] = (0, 1, 2, 3),
    quantized: bool = False,
) -> list[Candidate]:
    """Those of one way to share rows, with tiles and activations on the host as the configuration says, fastest first.
    With one rank nothing can be shared, so only stages 0 (and offload) are tried; gathers of 8 bits, which change the
    numbers, only when they are asked for (`quantized`)."""
    buffers = buffers_for(config)
    shared = config.sequence_parallel_size
    groups = cluster.world_size // shared
    per_rank = -(-global_batch // groups)
    found = []
    for stage, hpz, optimizer, weights, eighth in _sharing(cluster, stages, quantized):
        for micro in _powers_of_two(per_rank):
            steps = -(-per_rank // micro)
            for every in RECOMPUTE:
                setup = Setup(
                    micro_batch=micro,
                    accumulation=steps,
                    world=cluster.world_size,
                    precision=precision,
                    stage=stage,
                    hpz=hpz,
                    offload_optimizer=optimizer,
                    offload_params=weights,
                    checkpoint_every=every,
                    document_tokens=data.document_tokens,
                    supervised=data.supervised,
                    fill=data.fill,
                    bucket=buffers.reduce_bucket if stage in (1, 2) else 0,
                    quantized_weights=eighth,
                    reuse=buffers.live if stage == 3 else 0,  # the two are equal, see zero_sizes
                    sequence_parallel=shared,
                    mlp_tile=config.mlp_tile_tokens or 0,
                    head_groups=config.attention_head_groups,
                    activation_offloading=config.activation_offloading and every > 0,
                )
                memory = peak_memory(config, setup, buffers, cluster.device.memory)
                speed = predict(config, setup, cluster).of_batch(global_batch, setup)
                fits = memory.device <= cluster.device.memory
                found.append(Candidate(setup, memory, speed, fits))
    return sorted(found, key=lambda candidate: -candidate.rate)


def _sequence_sizes(config: Config, cluster: Cluster) -> list[int]:
    """How many ranks may share a row's tokens, the fewest first. The size that was asked for, where one was."""
    size = config.sequence_parallel_size
    if size > 1 or "sequence_parallel_size" in config.explicit or config.experts is not None or config.compile:
        return [size]
    most = math.gcd(cluster.world_size, config.num_heads)
    sizes = (size for size in range(1, most + 1) if most % size == 0)
    return [size for size in sizes if config.attention_head_groups in (1, *config.fitting_head_groups(size))]


def _leaner(config: Config, precision: str) -> Iterator[Config]:
    """The configuration with tiles, also with attention in as many groups of heads as there can be beside them, with
    activations on the host, and with all of these; what was asked for stays."""
    tiles, host, groups = [config.mlp_tile_tokens], [config.activation_offloading], [config.attention_head_groups]
    if "mlp_tile_tokens" not in config.explicit and not config.untiled:
        tiles += [tile for tile in TILES if tile < config.seq_length]
    if "activation_offloading" not in config.explicit:
        host += [True]
    if "attention_head_groups" not in config.explicit and config.saves_by_head_groups(precision):
        groups += [count for count in config.fitting_head_groups(config.sequence_parallel_size)[-1:] if count > 1]
    for offloading, tile, count in itertools.product(host, tiles, groups):
        if tile or count == config.attention_head_groups:
            changes = {
                "mlp_tile_tokens": tile,
                "attention_head_groups": count,
                "activation_offloading": offloading,
            }
            if any(getattr(config, name) != value for name, value in changes.items()):
                # Which layers are recomputed is the search's to choose; without one there is nothing to offload.
                yield config.replace(gradient_checkpointing=config.gradient_checkpointing or offloading, **changes)


def _sharing(cluster: Cluster, stages: tuple[int, ...], quantized: bool) -> Iterator[tuple[int, int, bool, bool, bool]]:
    """(stage, ranks of hpZ, optimizer on the host, weights on the host, gathers of 8 bits)."""
    for stage in stages:
        for eighth in (False, True) if quantized and stage == 3 else (False,):
            if cluster.world_size > 1 or stage == 0:
                yield stage, 0, False, False, eighth
            if stage == 3 and cluster.nodes > 1 and cluster.gpus_per_node > 1:
                yield stage, cluster.gpus_per_node, False, False, eighth
        if stage in (2, 3):
            yield stage, 0, True, False, False
        if stage == 3:
            yield stage, 0, True, True, False


def _powers_of_two(most: int) -> Iterator[int]:
    """1, 2, 4 … up to `most`, and `most` itself."""
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most
