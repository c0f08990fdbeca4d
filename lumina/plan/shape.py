"""What the cost models know of a run: its data, and the shape that a resolved DeepSpeed JSON gives its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lumina.config import Config
from lumina.plan.memory import Buffers
from lumina.plan.workload import Shape


@dataclass(frozen=True)
class Data:
    """What the estimate knows of the data. tokens: of one epoch; document_tokens: the length-weighted mean,
    sum(L^2)/sum(L), which gives the attention work of the real mix; fill: share of each window that packing fills."""

    tokens: float
    document_tokens: float | None
    supervised: float
    fill: float
    source: str


def shape_of(config: Config, document: dict[str, Any], world: int, data: Data) -> tuple[Shape, Buffers]:
    """The cost model's view of a resolved DeepSpeed JSON."""
    zero = document.get("zero_optimization", {})
    stage, hpz = int(zero.get("stage", 0)), int(zero.get("zero_hpz_partition_size", 1))

    def offloads(key: str) -> bool:
        return bool((zero.get(key) or {}).get("device", "none") != "none")

    shape = Shape(
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
    )
    buffers = Buffers(
        reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        persistence=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        sub_group=int(zero.get("sub_group_size", 1_000_000_000)),
        live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
    )
    return shape, buffers
