"""Release of what DeepSpeed (0.19.8) and torch keep of an engine after its `destroy`.

A backward pass on a CPU that fails half way leaves its tasks in the queue of the thread that called it, and with them
the graph, its activations and, through DeepSpeed's nodes, the engine. Tasks of a pass that is over are thrown away when
they come up, but those of younger nodes come up first: they stay for good, unless a pass runs through an older node.
(The queues of a GPU belong to threads of torch, which empty them.)

Of a ZeRO-3 engine two places in DeepSpeed's modules hold the model, and with it weights, gradients and optimizer: a
list of the modules that a forward pass is in, which the model itself never leaves, nor what a failed forward pass was
in; and a cache of which parameters to release after a module, whose keys are the modules.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def oldest_node() -> Tensor:
    """The end of a graph of one node, older than every graph that this thread makes from now on."""
    with torch.enable_grad():
        return torch.zeros((), requires_grad=True) * 1.0


def clear_failed_backward_passes(older: Tensor) -> None:
    """Throw away what failed backward passes of this thread left, all of it younger than `older`."""
    torch.autograd.backward(older, retain_graph=True)


def release_cache() -> Any:
    """The cache of which parameters to release after a module: that of all engines, on a method under a decorator.

    Raises:
        LookupError: there is none where it was.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    cached: Any = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    found = [value for value in inspect.getclosurevars(cached).nonlocals.values() if hasattr(value, "cache_clear")]
    if len(found) != 1:
        raise LookupError("_PartitionedParameterCoordinator__params_to_release has no cache")
    return found[0]


def release(model: nn.Module) -> None:
    """Make DeepSpeed forget a model whose engine is closed."""
    from deepspeed.runtime.zero import parameter_offload

    own = set(model.modules())
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m not in own]
    release_cache().cache_clear()  # another engine fills it again
