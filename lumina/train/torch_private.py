"""What this room uses of torch beyond its documented interface, with what for. Nothing else here touches such names.

They are checked when this module is imported, before anything is built: a torch without one of them ends the start
with its name. The kernels keep their own (kernels/launch.py, kernels/plans.py): they know nothing of this package.
"""

from __future__ import annotations

from datetime import timedelta
from inspect import unwrap
from typing import Any

import torch
from torch.distributed import distributed_c10d

from lumina.config.private_names import PrivateName, require

NAMES = (
    PrivateName("torch.distributed.distributed_c10d", "_get_default_store", "the process group's key-value store", ()),
    PrivateName("torch.distributed.distributed_c10d", "_world", "every process group of this process"),
    PrivateName("torch.distributed.distributed_c10d", "_set_pg_timeout", "a group's timeout", ("timeout", "group")),
    PrivateName("torch", "_fused_adamw_", "AdamW's update of many tensors in one launch"),
    PrivateName("torch", "_foreach_copy_", "copies of many tensors in few launches"),
    PrivateName("torch", "_foreach_mul_", "clipping many gradients in few launches"),
    PrivateName("torch", "_foreach_norm", "norms of many gradients in few launches"),
)
# In builds for a GPU only, and needed where torch.accelerator has no such function yet, as in torch 2.11.
_HOST_CACHE = PrivateName("torch._C", "_host_emptyCache", "giving pinned memory back")
_on_gpu: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
_needed = _on_gpu and not hasattr(torch.accelerator, "empty_host_cache")
require("torch", (*NAMES, _HOST_CACHE) if _needed else NAMES)

#: AdamW's update; `found_inf` is a decision on the device, whether to make it.
fused_adamw = torch._fused_adamw_
#: The same operation on every tensor of a list.
foreach_copy = torch._foreach_copy_
foreach_multiply = torch._foreach_mul_
foreach_norm = torch._foreach_norm


def default_store() -> Any:
    """The process group's key-value store: reachable while a collective cannot be."""
    return distributed_c10d._get_default_store()


def empty_host_cache() -> None:
    """Give back the pinned memory that nothing uses any more. Only in a process with a GPU."""
    public = getattr(torch.accelerator, "empty_host_cache", None)
    (public or getattr(torch._C, _HOST_CACHE.name))()


def set_group_timeouts(timeout: timedelta) -> None:
    """Of every process group of this process, whoever made it: for collectives that begin from now on."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the wrappers for compiled optimizers: they import torch's compiler, whose modules take
    2.5 s of every rank's start (torch 2.13)."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
