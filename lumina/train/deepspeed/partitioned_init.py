"""ZeRO-3 without a whole model on any rank: each weight is partitioned among the ranks as soon as it is drawn.

A module's parameters are final when the module is given to its parent. torch calls a hook at that moment, and there
DeepSpeed's own conversion (`zero.Init._zero_init_param`, what `deepspeed.initialize` otherwise does to a whole model at
once) broadcasts rank 0's values, keeps this rank's share and frees the rest. So a rank holds its share and one matrix,
and the values are those of a model that is built whole: the same float32 draws, in the same order, from the same
generator, rounded to the engine's type in the same way.

Why `zero.Init` is not entered as a context, its documented use (read and tried in DeepSpeed 0.19.8):

- Inside, torch.empty and its like give tensors of the engine's type on the engine's device. A normal distribution drawn
  in bfloat16, or by a GPU's generator, is not the float32 draw rounded: the seed would mean other weights than under
  the other stages.
- It partitions a module right after its own `__init__`. `linear` (lumina.model.layers) draws after
  `nn.Linear.__init__`, into what would be an empty tensor by then, and torch reports nothing.
- Without its `module` argument `zero.Init` does not replace `torch.nn.functional.linear`, which `deepspeed.initialize`
  does for a model that it partitions itself. The plain one keeps every gathered weight until the backward pass (it
  saves the transposed view): the memory that ZeRO-3 is there to save.
- Given a `dtype`, it takes bfloat16 wherever fp16 is not supported, whatever was given; left out, the type is that of
  the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

_DRAWS = {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_}


def partitions_on_init(ds_config: dict[str, Any]) -> bool:
    """Whether weights are partitioned while the model is built: under ZeRO-3, but for two settings for which DeepSpeed
    must have the whole model first: weights on NVMe (its swapper belongs to the engine), and quantised frozen weights.
    """
    zero = ds_config.get("zero_optimization", {})
    on_disk = (zero.get("offload_param") or {}).get("device") == "nvme"
    quantised = zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights")
    return int(zero.get("stage", 0)) == 3 and not on_disk and not quantised


@contextmanager
def partition_on_init(ds_config: dict[str, Any], drawn: bool = True) -> Iterator[None]:
    """A context in which a model is built; every rank must build the same one. Under ZeRO-3 its weights are partitioned
    as they come, under other stages nothing changes.

    Args:
        ds_config: what `deepspeed.initialize` will get.
        drawn: False where every weight is loaded before its first use: partitioned weights then hold what the memory
            held, and torch's generator stays where it was. Each rank draws every weight twice (nn.Linear's own values,
            then ours): 22 ns a weight on the CPU of the tables in docs/plan.md, 25 minutes for 70B.
    """
    if not partitions_on_init(ds_config):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import Init

    init = Init(config_dict_or_path=ds_config)
    if init.mem_efficient_linear:
        init._enable_mem_efficient_linear()
    with ExitStack() as stack:
        stack.callback(register_module_module_registration_hook(lambda _, __, child: _partition(child, init)).remove)
        if not drawn:
            stack.enter_context(_NoDraws())
        yield


@torch.no_grad()
def _partition(module: nn.Module, init: Any) -> None:
    for parameter in module.parameters():
        if not is_partitioned(parameter):  # the output layer's is the embedding's, an adapted matrix has been moved
            parameter.data = parameter.data.to(init.local_device, init.dtype)
            init._zero_init_param(parameter)


class _NoDraws(TorchFunctionMode):
    """Leaves tensors as they are that would be drawn."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed has sharded this parameter; its own shape is (0,) then, but while it is gathered."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape, sharded or not."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


def whole_numel(parameter: Tensor) -> int:
    """A parameter's number of elements, sharded or not."""
    return math.prod(whole_shape(parameter))


def local_shard(parameter: Tensor) -> tuple[Tensor, int]:
    """What this rank keeps of a parameter: a writable flat tensor and the index of its first element in the whole. All
    of it where nothing is partitioned."""
    if not is_partitioned(parameter):
        return parameter.detach().view(-1), 0
    shard: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    whole: int = parameter.ds_numel  # type: ignore[attr-defined]
    start = shard.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    return shard.detach()[: max(0, min(shard.ds_numel, whole - start))], start  # the last shares end in padding


def drop_secondary_copy(parameter: Tensor) -> None:
    """Drop the second copy that hpZ keeps within a node: the part was written to, and the next gather makes another."""
    if is_partitioned(parameter):
        parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
