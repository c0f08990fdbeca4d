"""What DeepSpeed (0.19.8) keeps of a ZeRO-3 engine after its `destroy`, given up.

Two places in its modules hold the model, and with it weights, gradients and optimizer: a list of the modules that a
forward pass is in, which the model itself never leaves, nor what a failed forward pass was in; and a cache of which
parameters to release after a module, whose keys are the modules. Of stages 0 to 2 nothing is kept.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def release(model: nn.Module) -> None:
    """Make DeepSpeed forget a model whose engine is closed."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    own = set(model.modules())
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m not in own]
    # A method whose cache is that of all engines: another one fills it again. A decorator hides it.
    cached: Any = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    for cell in getattr(cached, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
