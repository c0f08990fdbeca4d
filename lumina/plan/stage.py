"""The ZeRO stage of a run that names none: on several GPUs, the least sharing that fits.

Stage 1 reduces gradients once a step and keeps them whole on every rank; 2 keeps a share and reduces after every
micro-batch; 3 also gathers the weights in every pass. Losses are the same under each (law 2). A function of the
configuration and the GPU's size alone, so that a resumed run on the same machines computes as before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lumina.config import Config, UserError
from lumina.config.deepspeed import default_json, resolve
from lumina.plan.costs.devices import find_device
from lumina.plan.costs.memory import peak_memory
from lumina.plan.costs.setup import Data, read_setup

ROOMY = 0.9  # of the device's memory: the estimate of activations is the model's, not the allocator's
_FULL = Data(0.0, None, 1.0, 1.0, "samples full of supervised tokens: the most that a batch can take")


def default_document(config: Config, world: int, memory: float | None, *, bf16_supported: bool | None = None) -> Any:
    """The DeepSpeed JSON of a run without --ds_config: None where lumina.config.deepspeed's own default stands.

    Args:
        config: its `ds_config` is not set.
        world: number of processes.
        memory: bytes of the smallest GPU; None on a CPU or where it is not known.
        bf16_supported: passed on to `resolve` (None asks the device).
    """
    if config.ds_config is not None or world == 1 or memory is None or config.lora_rank:
        return None  # adapters: the memory model counts gradients and moments of every weight
    resolved = resolve(config, world, "cuda", bf16_supported=bf16_supported, document=default_json(world, 3))
    setup, buffers = read_setup(resolved.config, resolved.json, world, _FULL)
    for stage in (1, 2):
        if peak_memory(config, replace(setup, stage=stage), buffers, memory).device <= ROOMY * memory:
            return default_json(world, stage)
    return default_json(world, 3)


def smallest_memory() -> float | None:
    """Bytes of the smallest GPU of all ranks, the same number on each: as advertised where the card is known, so that a
    run decides as `lumina estimate-time` does. None on a CPU. Every rank must call it."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        own = find_device(properties.name).memory
    except UserError:
        own = float(properties.total_memory)
    least = torch.tensor(min(own, properties.total_memory), dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return float(least)
