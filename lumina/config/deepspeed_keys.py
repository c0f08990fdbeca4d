"""Schema of DeepSpeed's JSON: the keys that Lumina reads, strictly typed; keys that are refused, with the reason; and
the top-level keys that DeepSpeed 0.19 knows, for a did-you-mean. What else a file holds is passed on to DeepSpeed.

DeepSpeed takes the truth of `"enabled": 1`, ignores a misspelt block and fails with a traceback on each rank for a text
in a number's place. Here a value of another type is refused with its path, before anything is loaded.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lumina.config.errors import UserError, did_you_mean

Json = dict[str, Any]
AUTO: Literal["auto"] = "auto"

# Keys that DeepSpeed (0.19) removed or that Lumina does in its own way. Silence would train something else than asked.
REFUSED_KEYS = {
    "elasticity": "DeepSpeed removed it; Lumina keeps the global batch at any world size by itself (see --resume)",
    "nebula": "DeepSpeed removed it; Lumina writes its own verified checkpoints",
    "amp": "DeepSpeed removed it; use a bf16 or fp16 block, or --precision",
    "curriculum_learning": "DeepSpeed removed it; Lumina's order of samples is a function of seed and step",
    "compression_training": "DeepSpeed removed it",
    "quantize_training": "DeepSpeed removed it",
    "eigenvalue": "DeepSpeed removed it",
    "sparse_attention": "DeepSpeed removed it",
    "sparse_gradients": "DeepSpeed removed it",
    "progressive_layer_drop": "DeepSpeed removed it",
    "graph_harvesting": "DeepSpeed removed it",
    "scheduler": (
        "Lumina's learning rate is a function of the step (lr_scheduler, warmup_ratio, min_lr), so that a resumed run "
        "continues on the same curve; remove the block and set those keys"
    ),
    "data_efficiency": "Lumina's own sampler fixes the order of samples; DeepSpeed's would train other ones",
    "tensor_parallel": "Lumina's layers are not divided between GPUs; ZeRO stage 3 divides their weights",
    "expert_parallel": "Lumina's experts are not divided between GPUs; ZeRO stage 3 divides their weights",
    "sequence_parallel_size": "Lumina's own shares rows between ranks: --sequence-parallel P (docs/long-context.md)",
}
REFUSED_ZERO_KEYS = {
    "mics_shard_size": "DeepSpeed removed it; zero_hpz_partition_size keeps copies of the weights in each node",
    "mics_hierarchical_params_gather": "DeepSpeed removed it",
    "zeropp_loco_param": "DeepSpeed removed it",
}

#: DeepSpeed 0.19's top-level keys that Lumina only passes on.
PASSED_ON = (
    *("activation_checkpointing", "aio", "autotuning", "bfloat16", "checkpoint", "comet", "comms_logger", "compile"),
    *("communication_data_type", "csv_monitor", "data_types", "dataloader_drop_last", "datastates_ckpt"),
    *("disable_allgather", "disable_python_gc", "dump_state", "flops_profiler", "gradient_allreduce_op"),
    *("gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown"),
    *("pipeline", "prescale_gradients", "seq_parallel_communication_data_type", "tensorboard", "timers"),
    *("torch_autocast", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb"),
    *("weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)

Auto = Literal["auto"]


def _whole(value: Any) -> Any:
    """5e8 is a number of elements, as DeepSpeed's documentation writes it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integer(value: Any) -> Any:
    """True and 2.0 equal numbers that a literal takes."""
    return value if type(value) is int else repr(value)


_Count = Annotated[int, Field(gt=0)] | Auto
_Elements = Annotated[Annotated[int, Field(ge=0)] | Auto, BeforeValidator(_whole)]
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)] | Auto
_Switch = bool | Auto


class _Block(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Precision(_Block):
    enabled: _Switch = AUTO
    check_grad_overflow: bool = True
    loss_scale: _Number = 0.0


class _Offload(_Block):
    device: Literal["none", "cpu", "nvme"] = "none"


class _Zero(_Block):
    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_integer)] = 0
    reduce_bucket_size: _Elements = AUTO
    allgather_bucket_size: _Elements = AUTO
    stage3_prefetch_bucket_size: _Elements = AUTO
    stage3_param_persistence_threshold: _Elements = AUTO
    stage3_max_live_parameters: _Elements = AUTO
    stage3_max_reuse_distance: _Elements = AUTO
    sub_group_size: _Elements = AUTO
    overlap_comm: _Switch | None = AUTO
    compute_grad_norm: bool = True
    offload_optimizer: _Offload | None = None
    offload_param: _Offload | None = None


class _AdamParams(_Block):
    lr: _Number = AUTO
    eps: _Number = AUTO
    weight_decay: _Number = AUTO
    betas: Annotated[list[_Number], Field(min_length=2, max_length=2)] | Auto = AUTO
    adam_w_mode: _Switch = True
    amsgrad: _Switch = False
    bias_correction: _Switch = True


class _Optimizer(_Block):
    type: str = "AdamW"
    params: _AdamParams = _AdamParams()


class _Document(_Block):
    train_batch_size: _Count = AUTO
    train_micro_batch_size_per_gpu: _Count = AUTO
    gradient_accumulation_steps: _Count = AUTO
    gradient_clipping: _Number = AUTO
    steps_per_print: _Count | None = None
    fp16: _Precision = _Precision()
    bf16: _Precision = _Precision()
    zero_optimization: _Zero = _Zero()
    optimizer: _Optimizer | None = None


def check(document: Json, source: str) -> list[str]:
    """What a user is to be told of a document, a line each.

    Raises:
        UserError: a value of another type than its key's, a key that is refused or looks misspelt, or a setting that
            would change nothing.
    """
    for key, why in REFUSED_KEYS.items():
        if key in document:
            raise UserError(f"{source}: `{key}` is not supported: {why}")
    known = {*_Document.model_fields, *PASSED_ON}
    notes = []
    for key in document.keys() - known:
        if hint := did_you_mean(key, known):
            raise UserError(f"{source}: unknown key `{key}`.{hint}")
        notes.append(f"WARNING: {key} is no key of DeepSpeed's that Lumina knows: it is passed on")
    zero = document.get("zero_optimization")
    for key, why in REFUSED_ZERO_KEYS.items():
        if isinstance(zero, dict) and key in zero:
            raise UserError(f"{source}: `zero_optimization.{key}` is not supported: {why}")
    try:
        read = _Document.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error, document)}", "See ds_configs/ for whole files.") from None
    _refuse_without_effect(read, source)
    for name in ("offload_optimizer", "offload_param"):
        offload: _Offload | None = getattr(read.zero_optimization, name)
        if offload is not None and offload.device != "none" and not read.zero_optimization.stage:
            notes.append(f"WARNING: zero_optimization.{name} changes nothing at stage 0, which divides nothing")
    return notes


def _refuse_without_effect(read: _Document, source: str) -> None:
    """UserError for settings that would be ignored, or come to nothing at the first save."""
    params = read.optimizer.params if read.optimizer is not None else _AdamParams()
    for name, ours in (("adam_w_mode", True), ("amsgrad", False), ("bias_correction", True)):
        given = getattr(params, name)
        if given not in (AUTO, ours):
            raise UserError(
                f"{source}: optimizer.params.{name} = {str(given).lower()} is not supported: Lumina trains with AdamW, "
                "decoupled weight decay and corrected moments, without AMSGrad",
                "Remove the key.",
            )
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(read.zero_optimization, name)
        if offload is not None and offload.device == "nvme":
            raise UserError(
                f"{source}: zero_optimization.{name}.device = nvme is not supported: no checkpoint can hold what is on "
                "NVMe",
                'Write "cpu", which keeps it in the host\'s memory.',
            )


def _explain(error: ValidationError, document: Json) -> str:
    """The first finding, with the path of its key and the value that stands there."""
    first = error.errors()[0]
    path: list[str] = []
    value: Any = document
    for part in first["loc"]:  # pydantic names the members of a union too
        if not (isinstance(value, dict) and part in value):
            break
        value = value[part]
        path.append(str(part))
    same = [item["msg"] for item in error.errors() if item["loc"][: len(path)] == first["loc"][: len(path)]]
    wanted = ", or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in same))
    return f"`{'.'.join(path)}` is {_shown(value)}; it must be {wanted}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
