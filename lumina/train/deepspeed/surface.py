"""Every private name of DeepSpeed that Lumina uses, with what for; checked at the start, before an engine is built.

The rest of this folder reaches the names listed here and no others, and nothing outside of it reaches any of them
(tests/train/deepspeed/test_surface.py reads the source). Public calls are not listed: `deepspeed.initialize`,
`init_distributed`, the engine's forward, backward, step, train, eval, module, optimizer, destroy and
set_gradient_accumulation_boundary, `deepspeed.zero.Init`, `deepspeed.utils`, DeepSpeedCPUAdam and its builder, the
accelerator's interface; and outside of this folder `deepspeed.runtime.activation_checkpointing.checkpointing`, which
DeepSpeed documents by that path.

To try another version of DeepSpeed: widen the bounds in setup.py and run the tests of this folder. A name that is gone
fails here; what a name means is what the tests of the engine, the fragments and the gradient gate compare.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

from lumina.config import UserError
from lumina.config.private_names import PrivateName, require, tried
from lumina.config.versions import refuse_untried
from lumina.train.deepspeed.half_precision import HalfPrecisionAdamW
from lumina.train.deepspeed.release import release_cache

_RUNTIME = "deepspeed.runtime"
ENGINE = f"{_RUNTIME}.engine:DeepSpeedEngine"
ZERO_1_2 = f"{_RUNTIME}.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO_3 = f"{_RUNTIME}.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BF16 = f"{_RUNTIME}.bf16_optimizer:BF16_Optimizer"
SCALER = f"{_RUNTIME}.fp16.loss_scaler:DynamicLossScaler"
PARTITIONING = f"{_RUNTIME}.zero.partition_parameters"
INIT = f"{PARTITIONING}:Init"
OFFLOAD = f"{_RUNTIME}.zero.parameter_offload"
COORDINATOR = f"{_RUNTIME}.zero.partitioned_param_coordinator:PartitionedParameterCoordinator"
LINKAGE = "deepspeed.utils.mixed_precision_linkage"
FRAGMENT = "deepspeed.utils.tensor_fragment"
BACKEND = "deepspeed.comm.torch:TorchBackend"
BUILDER = "deepspeed.ops.op_builder.builder:OpBuilder"

#: The collectives of DeepSpeed's backend that are timed (timing.py).
COLLECTIVES = (
    "all_reduce",
    "inference_all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "barrier",
)

_STARTUP = (
    PrivateName("deepspeed.comm.torch", "build_shm_op", "replaced: no compilation of an operator nobody uses", ()),
    PrivateName(f"{_RUNTIME}.zero.muon.muon_optimizer", "MuonWithAuxAdam", "imported without torch's compiler"),
    PrivateName(f"{_RUNTIME}.zero.utils", "ZERO_SUPPORTED_OPTIMIZERS", "our AdamW is named as one of them"),
    PrivateName(
        f"{_RUNTIME}.config", "DeepSpeedConfig", "what DeepSpeed refuses in its JSON, before a start", ("config",)
    ),
    PrivateName("deepspeed.ops.op_builder.builder", "OpBuilder", "the class of them all"),
    PrivateName(BUILDER, "is_compatible", "whether an operator can be built", ("verbose",)),
    PrivateName(BUILDER, "load", "building an operator", ("verbose",)),
    PrivateName(BUILDER, "jit_load", "replaced: one build at a time, and no half of one", ("verbose",)),
    PrivateName(BUILDER, "name", "its folder"),
)

_ENGINE = (
    PrivateName(ENGINE, "basic_optimizer", "the optimizer proper, inside DeepSpeed's wrapper"),
    PrivateName(ENGINE, "device", "where the model computes"),
    PrivateName(ENGINE, "enable_backward_allreduce", "no reduction of one rank with itself"),
    PrivateName(ENGINE, "backward", "a backward pass without division", ("loss", "retain_graph", "scale_wrt_gas")),
    PrivateName(
        ENGINE,
        "_configure_fp16_optimizer",
        "replaced: our optimizer of stage 0 in bf16 and fp16",
        ("optimizer", "low_precision_dtype"),
    ),
    PrivateName(ENGINE, "dynamic_loss_scale", "whether fp16's loss scale adapts", ()),
    PrivateName(ENGINE, "dynamic_loss_scale_args", "how it adapts", ()),
    PrivateName(ENGINE, "loss_scale", "fp16's constant loss scale", ()),
    PrivateName(ENGINE, "gradient_clipping", "the norm to clip to", ()),
)

_SCALER = (
    PrivateName(ZERO_1_2, "loss_scaler", "fp16's loss scale"),
    PrivateName(ZERO_3, "loss_scaler", "fp16's loss scale"),
    *(PrivateName(SCALER, name, "the loss scale's state") for name in ("cur_scale", "cur_iter", "last_overflow_iter")),
    PrivateName(SCALER, "cur_hysteresis", "the loss scale's state"),
    PrivateName(
        SCALER,
        "__init__",
        "what the engine's dynamic_loss_scale_args are",
        ("init_scale", "scale_window", "min_scale", "delayed_shift", "consecutive_hysteresis"),
    ),
    PrivateName(SCALER, "update_scale", "replaced: its one exception means that the scale is exhausted", ("overflow",)),
)

_GATE = (
    *(
        PrivateName(owner, name, why, parameters)
        for owner in (ZERO_1_2, ZERO_3)
        for name, why, parameters in (
            ("check_overflow", "replaced: no question to the device", ("partition_gradients",)),
            ("get_grad_norm_direct", "replaced: no copy to the device", ("gradients", "params", "norm_type")),
            ("complete_grad_norm_calculation_for_cpu_offload", "replaced: the same of offloaded ones", ("params",)),
            ("norm_for_param_grads", "norms of gradients that have left the device", None),
            ("get_param_id", "the key of such a norm", ("param",)),
            ("_update_scale", "replaced once where a finite norm is refused", ("has_overflow",)),
            ("device", "where DeepSpeed's step has the norm", None),
        )
    ),
    *(
        PrivateName(module, "is_invalid_grad_norm", "replaced: the gate's answer instead of the device's", ("norm",))
        for module in (ZERO_1_2.split(":")[0], ZERO_3.split(":")[0], BF16.split(":")[0])
    ),
    PrivateName(ZERO_1_2, "compute_grad_norm", "whether there is a norm at all"),
    PrivateName(ZERO_1_2, "check_grad_overflow", "so that a bf16 norm is asked about"),
    PrivateName(ZERO_1_2, "scaled_global_norm", "replaced: where the norm is decided upon", ("norm_type",)),
    PrivateName(ZERO_1_2, "dp_process_group", "the ranks that share a norm"),
    PrivateName(ZERO_1_2, "_zero_padding", "gradients that are padding"),
    PrivateName(ZERO_3, "_get_norm_groups", "replaced: where the norm is decided upon", ()),
    PrivateName(ZERO_3, "_get_param_partition_group", "the ranks that share a norm", ("param",)),
    PrivateName(
        BF16.split(":")[0],
        "get_global_norm_of_tensors",
        "replaced: where the norm is decided upon",
        ("input_tensors", "norm_type", "mpu", "moe_ep_group"),
    ),
    PrivateName(
        BF16.split(":")[0],
        "clip_tensors_by_global_norm",
        "replaced: clips without waiting",
        ("input_tensors", "max_norm", "global_norm", "mpu", "eps"),
    ),
    PrivateName(ZERO_1_2, "cpu_offload", "whether the host reads what the streams write"),
    PrivateName(ZERO_3, "offload_optimizer", "whether the host reads what the streams write"),
    PrivateName(ZERO_3, "offload_param", "whether the host reads what the streams write"),
    PrivateName(ZERO_1_2, "reduction_stream", "ordered on the device"),
    PrivateName(ZERO_3, "reduce_and_partition_stream", "ordered on the device"),
    PrivateName(ZERO_3, "parameter_offload", "holds the stream below"),
    PrivateName(f"{OFFLOAD}:DeepSpeedZeRoOffload", "_DeepSpeedZeRoOffload__allgather_stream", "ordered on the device"),
    PrivateName(ZERO_1_2.split(":")[0], "get_accelerator", "replaced: its synchronize waits on the device", ()),
    PrivateName(PARTITIONING, "get_accelerator", "replaced: its synchronize waits on the device", ()),
)

_FRAGMENTS = (
    PrivateName(ZERO_1_2, "bit16_groups", "the model's weights by group"),
    PrivateName(ZERO_1_2, "single_partition_of_fp32_groups", "this rank's float32 weights by group"),
    PrivateName(BF16, "bf16_groups", "the model's weights by group"),
    PrivateName(BF16, "fp32_groups_flat_partition", "this rank's float32 weights by group"),
    PrivateName(ZERO_3, "fp16_groups", "the model's weights by sub-group"),
    PrivateName(ZERO_3, "fp16_partitioned_groups_flat", "this rank's shards of them"),
    PrivateName(ZERO_3, "fp32_partitioned_groups_flat", "this rank's float32 weights by sub-group"),
    PrivateName(ZERO_3, "grad_position", "where a parameter lies in them"),
    PrivateName(ZERO_3, "dp_process_group", "the ranks that share a parameter"),
    PrivateName(ZERO_3, "swap_optimizer", "whether the optimizer's state is on NVMe"),
    PrivateName(ZERO_3, "_unflatten_partitioned_parameters", "shards follow the flat weights", ("sub_group_id",)),
    PrivateName(ZERO_3, "persistent_parameters", "small parameters that every rank keeps whole"),
    PrivateName(f"{INIT}._convert_to_deepspeed_param", "partition", "persistent ones are sharded and gathered anew"),
    PrivateName(f"{INIT}._convert_to_deepspeed_param", "all_gather", "persistent ones are gathered anew"),
    PrivateName(ZERO_1_2, "update_lp_params", "the model's weights follow the float32 ones", ()),
    PrivateName(BF16, "update_lp_params", "the model's weights follow the float32 ones", ()),
    PrivateName(f"{LINKAGE}:link_hp_params", "_hp_mapping", "which part of a parameter this rank has, and where"),
    *(
        PrivateName(f"{FRAGMENT}:{owner}", name, "where that part lies")
        for owner, name in (
            ("tensor_fragment", "lp_fragment_address"),
            ("tensor_fragment", "hp_fragment_address"),
            ("fragment_address", "start"),
            ("fragment_address", "numel"),
        )
    ),
)

_LAYERS = (
    PrivateName(f"{FRAGMENT}:tensor_fragment", "get_lp_grad_fragment", "a gradient's part", ("index_in_param_group",)),
    PrivateName(f"{LINKAGE}:_init_lp_to_hp_mapping", "_index_in_param_group", "that part's place"),
)

_PARTITIONING = (
    PrivateName(INIT, "mem_efficient_linear", "whether linear layers save no gathered weight"),
    PrivateName(INIT, "_enable_mem_efficient_linear", "done by it only when it is given a whole model", ()),
    PrivateName(INIT, "_zero_init_param", "partitions one parameter", ("param",)),
    PrivateName(INIT, "local_device", "where parameters are brought before"),
    PrivateName(INIT, "dtype", "in which type"),
    *(
        PrivateName(f"{INIT}._convert_to_deepspeed_param", name, why)
        for name, why in (
            ("ds_id", "whether a parameter is partitioned"),
            ("ds_shape", "its whole shape"),
            ("ds_numel", "its whole size"),
            ("ds_tensor", "this rank's shard"),
            ("ds_secondary_tensor", "the copy that hpZ keeps within a node"),
            ("ds_process_group", "the ranks that share it"),
        )
    ),
)

_RELEASE = (
    PrivateName(OFFLOAD, "FWD_MODULE_STACK", "a list that keeps a closed engine's model"),
    PrivateName(
        COORDINATOR,
        "_PartitionedParameterCoordinator__params_to_release",
        "a cache that keeps a closed engine's model",
        ("submodule_to_release", "step_id"),
    ),
)

_COLLECTIVES = (
    PrivateName("deepspeed.comm.comm", "cdb", "the backend whose collectives are timed"),
    *(PrivateName(BACKEND, name, "timed") for name in COLLECTIVES),
)

NAMES = (
    *_STARTUP,
    *_ENGINE,
    *_SCALER,
    *_GATE,
    *_FRAGMENTS,
    *_LAYERS,
    *_PARTITIONING,
    *_RELEASE,
    *_COLLECTIVES,
)


def check() -> None:
    """See that the installed DeepSpeed is of a version that was tried and has every name.

    Raises:
        UserError: with the name or the version, and what to install.
    """
    refuse_untried()
    require("deepspeed", NAMES)
    try:
        release_cache()
    except LookupError as error:
        raise UserError(f"this DeepSpeed is not as Lumina knows it: {error}", tried("deepspeed")) from None


class Wrapper(Enum):
    """What DeepSpeed puts around the optimizer, by ZeRO stage and precision: where it keeps weights and gradients."""

    ZERO_3 = "stage 3"
    ZERO_1_2 = "stages 1 and 2"
    BF16 = "stage 1, bf16 with float32 accumulation"
    HALF = "stage 0 in bf16 or fp16: ours (half_precision.py)"
    NONE = "stage 0 in float32: the optimizer itself"

    @classmethod
    def of(cls, optimizer: Any) -> Wrapper:
        """Which one `DeepSpeedEngine.optimizer` is.

        Raises:
            UserError: an option of the DeepSpeed JSON has made one that Lumina does not know.
        """
        # Exactly these classes: a subclass (super_offload, ZenFlow) has a step of its own.
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        kinds: tuple[tuple[type, Wrapper], ...] = (
            (DeepSpeedZeroOptimizer_Stage3, cls.ZERO_3),
            (DeepSpeedZeroOptimizer, cls.ZERO_1_2),
            (BF16_Optimizer, cls.BF16),
            (HalfPrecisionAdamW, cls.HALF),
            (torch.optim.Optimizer, cls.NONE),
        )
        for kind, wrapper in kinds:
            if type(optimizer) is kind or (kind is torch.optim.Optimizer and isinstance(optimizer, kind)):
                return wrapper
        raise UserError(
            f"the DeepSpeed configuration makes a {type(optimizer).__name__}, which Lumina does not know",
            "Leave out what chooses another optimizer wrapper: zenflow, super_offload, pipeline parallelism.",
        )
