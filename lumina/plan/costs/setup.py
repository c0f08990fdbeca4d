"""The cost models' input: precision, ZeRO, batch and recomputation of a step, DeepSpeed's buckets, and the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lumina.config import Config, ModelConfig, round_up

FP32 = 4
BYTES = {"fp32": FP32, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Setup:
    """How one optimizer step is computed on each rank, as far as cost depends on it."""

    micro_batch: int  # samples of up to seq_length tokens
    accumulation: int
    world: int
    precision: str
    stage: int = 0
    hpz: int = 0  # ranks of a node that keep a second copy of stage 3's weights among them (arXiv:2306.10209); 0: none
    offload_optimizer: bool = False
    offload_params: bool = False
    checkpoint_every: int = 0  # every nth layer is recomputed; 0: none
    document_tokens: float | None = None  # None: documents fill the context
    supervised: float = 1.0  # share of tokens that the loss looks at
    fill: float = 1.0  # tokens of a sample / seq_length
    overlap: bool = True  # gradients are reduced beside the backward pass
    bucket: int = 0  # elements of a gradient bucket: the last one is reduced when nothing is left to hide it
    # Stages 1 and 2: each rank receives its share of the gradients alone. DeepSpeed all-reduces whole buckets instead.
    reduce_scatter: bool = False
    reuse: int = 0  # stage 3: a weight used again within so many elements stays gathered between forward and backward
    quantized_weights: bool = False  # stage 3 gathers weights as 8-bit integers (qwZ, arXiv:2306.10209)
    sequence_parallel: int = 1  # neighbouring ranks that share the tokens of a micro-batch
    mlp_tile: int = 0  # tokens of a tile of the feed-forward; 0: all at once
    head_groups: int = 1  # of attention's heads, one at a time
    activation_offloading: bool = False  # recomputed layers' inputs wait on the host
    # In bfloat16 on a CPU attention's backward pass does not read its result, and the logits' memory is kept.
    on_cpu: bool = False

    @property
    def element(self) -> int:
        """Bytes of an element of weights and activations."""
        return BYTES[self.precision]

    @property
    def groups(self) -> int:
        """Ranks, or groups of ranks that share rows, each of which reads a micro-batch of its own."""
        return self.world // self.sequence_parallel

    def tokens(self, model: ModelConfig) -> int:
        """Tokens of a micro-batch that one rank holds, with those of weight zero that fill its part up to whole tiles
        (lumina.data)."""
        return round_up(math.ceil(self.micro_batch * model.seq_length * self.fill / self.sequence_parallel))

    def useful_tokens(self, model: ModelConfig) -> float:
        """Tokens of the data in one step, over all ranks."""
        return self.micro_batch * model.seq_length * self.fill * self.accumulation * self.groups

    def exchanged_heads(self, model: ModelConfig) -> tuple[int, int]:
        """Query heads, and key heads as ranks that share rows exchange them: those of each group repeated until these
        divide their number (lumina.model.parallel)."""
        groups = self.head_groups
        return model.num_heads, groups * math.lcm(model.num_kv_heads // groups, self.sequence_parallel)


@dataclass(frozen=True)
class Buffers:
    """DeepSpeed's bucket sizes in elements, as in the resolved JSON."""

    reduce_bucket: int = 200_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    overlap: bool = True
    sub_group: int = 1_000_000_000
    live: int = 1_000_000_000  # gathered weights at any time under stage 3


@dataclass(frozen=True)
class Data:
    """What the estimate knows of the data. tokens: of one epoch; document_tokens: the length-weighted mean,
    sum(L^2)/sum(L), which gives the attention work of the real mix; fill: share of each sample that packing fills."""

    tokens: float
    document_tokens: float | None
    supervised: float
    fill: float
    source: str


def read_setup(config: Config, document: dict[str, Any], world: int, data: Data) -> tuple[Setup, Buffers]:
    """The cost model's view of a resolved DeepSpeed JSON."""
    zero = document.get("zero_optimization", {})
    stage, hpz = int(zero.get("stage", 0)), int(zero.get("zero_hpz_partition_size", 1))

    def offloads(key: str) -> bool:
        return bool((zero.get(key) or {}).get("device", "none") != "none")

    setup = Setup(
        micro_batch=int(document["train_micro_batch_size_per_gpu"]),
        accumulation=int(document["gradient_accumulation_steps"]),
        world=world,
        precision=next((name for name in ("bf16", "fp16") if document[name]["enabled"]), "fp32"),
        stage=stage,
        hpz=hpz if stage == 3 and hpz > 1 else 0,
        offload_optimizer=offloads("offload_optimizer"),
        offload_params=offloads("offload_param"),
        checkpoint_every=config.checkpoint_every,
        document_tokens=data.document_tokens,
        supervised=data.supervised,
        fill=data.fill,
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)) if stage in (1, 2) else 0,
        reduce_scatter=zero.get("use_multi_rank_bucket_allreduce") is False,
        reuse=int(zero.get("stage3_max_reuse_distance", 1_000_000_000)) if stage == 3 else 0,
        quantized_weights=stage == 3 and bool(zero.get("zero_quantized_weights")),
        sequence_parallel=config.sequence_parallel_size,
        mlp_tile=config.mlp_tile_tokens or 0,
        head_groups=config.attention_head_groups,
        activation_offloading=config.activation_offloading,
    )
    buffers = Buffers(
        reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        persistence=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        sub_group=int(zero.get("sub_group_size", 1_000_000_000)),
        live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
    )
    return setup, buffers
