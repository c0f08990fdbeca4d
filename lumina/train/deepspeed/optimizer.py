"""AdamW, with weight decay only where it belongs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lumina.config import Config
from lumina.train.deepspeed import extensions
from lumina.train.deepspeed.partitioned_init import whole_shape
from lumina.train.torch_private import AdamW


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in the order of `named_parameters`: matrices with decay; norms and embeddings without, as is usual for
    AdamW (arXiv:1711.05101) in language models. A tied output layer is the embedding; an untied one is a matrix. Frozen
    weights are in neither."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    embedding = {id(p) for name, p in model.named_parameters() if name.startswith("embedding.")}
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        matrix = len(whole_shape(parameter)) >= 2
        (decayed if matrix and id(parameter) not in embedding else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]  # adapters are matrices all; DeepSpeed takes no empty group


def build_optimizer(model: nn.Module, config: Config, ds_config: dict[str, Any]) -> torch.optim.Optimizer:
    """torch's fused AdamW, or DeepSpeed's CPU Adam when optimizer states are offloaded. An optimizer block in the
    user's DeepSpeed JSON has become part of `config` by now (lumina.config.deepspeed)."""
    groups = parameter_groups(model, config.weight_decay)
    settings: dict[str, Any] = {
        "lr": 0.0,  # the loop sets it before every step; some DeepSpeed wrappers make a dry first update on their own
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    zero = ds_config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if zero.get("stage", 0) and offload.get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.op_builder import CPUAdamBuilder

        extensions.build([CPUAdamBuilder()])
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)  # type: ignore[no-any-return]
    return AdamW(groups, fused=True, **settings)
