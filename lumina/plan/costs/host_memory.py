"""Host memory of one rank of a run on GPUs, in bytes: at the start, and for snapshots (lumina.checkpoint.staging).

A model is built in float32 on the host and cast to the engine's type there. Under ZeRO-3 that happens to one matrix at
a time (lumina.train.deepspeed.partitioned_init), after which DeepSpeed brings the rank's share to the host once, to lay
it out anew (`defragment` in zero/utils.py). benchmarks/start_memory.py measures the first; what imports take, 0.3 GB
and more with CUDA, comes on top.
"""

from __future__ import annotations

from lumina.config import ModelConfig
from lumina.plan.costs.memory import parameter_groups
from lumina.plan.costs.setup import FP32, Setup


def start(model: ModelConfig, setup: Setup) -> int:
    """The peak of a rank's start."""
    groups = parameter_groups(model)
    total, largest = sum(map(sum, groups)), max(map(max, groups))
    cast = setup.element if setup.element < FP32 else 0
    if setup.stage < 3:
        return FP32 * total + cast * largest
    return max((FP32 + cast) * largest, setup.element * -(-total // setup.world))


def snapshot(model: ModelConfig, setup: Setup) -> int:
    """The copy of float32 weights and two moments that a checkpoint is written from, pinned from the first save on."""
    return 3 * FP32 * -(-sum(map(sum, parameter_groups(model))) // setup.world)
