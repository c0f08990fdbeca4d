"""DeepSpeed's JSON: read a user's file, fill every "auto" from Lumina's configuration, refuse what contradicts it.

Who wins: a value that the user wrote down in Lumina's configuration (YAML, flag, --set) and another value in the JSON
contradict each other, and the run is refused with both names. A Lumina default or preset value gives way to the JSON.
Everything filled or overruled is reported, one line each.

Batch sizes are computed here because DeepSpeed floor-divides them and then asserts. Where the global batch does not
divide by world size times micro-batch, Lumina pads with samples of weight zero, so DeepSpeed gets the padded size:

    accumulation     = ceil(ceil(global / world) / micro)
    train_batch_size = micro * accumulation * world            (>= global)

Where ranks share the tokens of a micro-batch (sequence_parallel_size), each such group counts as one for samples; of
that DeepSpeed is not told, and train_batch_size counts all ranks.

No torch here. Spec of the JSON: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from pydantic import ValidationError

from lumina.config import precision as precision_rules
from lumina.config.deepspeed_keys import AUTO as AUTO
from lumina.config.deepspeed_keys import Json, check
from lumina.config.errors import UserError, explain_values, user_error
from lumina.config.schema import Config, ModelConfig
from lumina.files import FormatError, read_object

# What runs when no --ds_config is given: one process has nobody to share with; more share gradients and optimizer
# states. On GPUs whose memory is known the plan chooses instead (lumina.plan.stage).
DEFAULT_STAGE_ONE_PROCESS = 0
DEFAULT_STAGE_SEVERAL = 2

# Elements of a gradient bucket: 100 MB in half precision, at which NCCL's collectives reach their rate between nodes,
# and several to a model, so that all but the last are reduced while the backward pass goes on.
REDUCE_BUCKET = 50_000_000
MOST_BYTES, MOST_DEPTH = 1 << 20, 50  # of a DeepSpeed JSON

ADAM_TYPES = frozenset({"adam", "adamw", "torch_adam", "fusedadam"})


class Resolved(NamedTuple):
    """`json`: what `deepspeed.initialize` gets, no "auto" left, batch sizes consistent. `report`: what was filled or
    overruled. `config`: the configuration with the values that gave way to the JSON; train with this one."""

    json: Json
    report: list[str]
    config: Config


def default_json(world_size: int, stage: int | None = None) -> Json:
    """The JSON of a run that names no file; `stage` where something has chosen one."""
    if stage is None:
        stage = DEFAULT_STAGE_ONE_PROCESS if world_size == 1 else DEFAULT_STAGE_SEVERAL
    return {
        "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": AUTO,
        "bf16": {"enabled": AUTO},
        "fp16": {"enabled": AUTO},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": AUTO},
    }


def read_json(path: str) -> Json:
    """A DeepSpeed JSON file. Raises UserError with line and column on a syntax error, a missing file or a key given
    twice (DeepSpeed refuses that as well)."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> Json:
        seen: Json = {}
        for key, value in pairs:
            if key in seen:
                raise UserError(f"{path}: `{key}` is given twice")
            seen[key] = value
        return seen

    try:
        document = read_object(path, most=MOST_BYTES, finite=True, object_pairs_hook=no_duplicates)
    except FormatError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot read the DeepSpeed configuration {user_error(error)}") from None
    _refuse_deep(document, path)
    return document


def _refuse_deep(document: Json, path: str) -> None:
    """UserError for nesting that would exhaust the stack where the document is copied and gone through."""
    level: list[Any] = [document]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return
    raise UserError(f"{path} is nested too deeply: more than {MOST_DEPTH} levels")


def resolve(
    config: Config,
    world_size: int,
    device_type: str,
    *,
    bf16_supported: bool | None = None,
    document: Json | None = None,
) -> Resolved:
    """Fill and check the run's DeepSpeed JSON.

    Args:
        config: the run's configuration; `config.ds_config` names the file, None takes `default_json`.
        world_size: number of processes, all of which DeepSpeed takes for data-parallel.
        device_type: `cpu` or `cuda`.
        bf16_supported: passed on to `lumina.config.precision.resolve` (None asks the device).
        document: the JSON itself, for a caller that has made one; read from the file otherwise.

    Raises:
        UserError: unreadable file, refused key, contradiction, a precision that the device lacks, an unknown "auto".
    """
    source = config.ds_config or "the built-in DeepSpeed configuration"
    if document is None:
        document = read_json(config.ds_config) if config.ds_config else default_json(world_size)
    notes = check(document, source)
    merge = _Merge(config, copy.deepcopy(document), source)
    merge.report += notes
    merge.take_adam_settings()
    merge.fill_precision(device_type, bf16_supported)
    merge.keep_overflow_checks()
    merge.fill("gradient_clipping", "max_grad_norm")
    merge.fill_batches(world_size)
    merge.fill_zero(device_type != "cpu" and world_size > 1)
    merge.json.setdefault("steps_per_print", 2**31 - 1)  # Lumina prints its own line
    _refuse_leftover_auto(merge.json, source)
    try:
        return Resolved(merge.json, merge.report, config.replace(**merge.changes))
    except ValidationError as error:
        raise UserError(f"{source}: {explain_values(error)}") from None


class _Merge:
    """The JSON while "auto" is filled in, the report, and the settings that it overrides."""

    def __init__(self, config: Config, document: Json, source: str) -> None:
        self.config = config
        self.json = document
        self.source = source
        self.report: list[str] = []
        self.changes: Json = {}

    def value(self, name: str) -> Any:
        return self.changes.get(name, getattr(self.config, name))

    def contradiction(self, key: str, given: Any, name: str, ours: Any) -> UserError:
        return UserError(
            f"{self.source} says {key} = {given}, but {name} = {ours} was set in Lumina's configuration",
            f'Write "auto" for {key} in the JSON, or leave {name} out.',
        )

    def fill(self, path: str, name: str, block: Json | None = None) -> None:
        """Fill the last part of the dotted `path` from the setting `name`, or override the setting by it."""
        block = self.json if block is None else block
        key = path.rsplit(".", 1)[-1]
        given, ours = block.get(key, AUTO), self.value(name)
        if given == AUTO:
            block[key] = ours
            self.report.append(f"{path} = {ours} (from {name})")
        elif given != ours:
            self.override_setting(path, given, name)

    def override_setting(self, path: str, given: Any, name: str) -> None:
        """Take the JSON's value for a setting that has a default or a preset's value; refuse it where the user wrote
        the setting down."""
        ours = self.value(name)
        if name in self.config.explicit:
            raise self.contradiction(path, given, name, ours)
        self.changes[name] = given
        self.report.append(f"{name} = {given} (from {path} in {self.source}, instead of the default {ours})")

    def take_adam_settings(self) -> None:
        """Take over the numbers of an Adam block as settings; the block itself goes, because Lumina builds the
        optimizer (norms and embeddings without decay), which DeepSpeed then partitions or offloads."""
        block = self.json.pop("optimizer", None)
        if block is None:
            return
        kind = str(block.get("type", "AdamW"))
        if kind.lower() not in ADAM_TYPES:
            raise UserError(
                f"{self.source}: optimizer.type `{kind}` is not supported: Lumina trains with AdamW",
                "Remove the optimizer block, or use AdamW.",
            )
        params = block.get("params", {})
        flat = {key: params[key] for key in ("lr", "eps", "weight_decay") if key in params}
        if params.get("betas", AUTO) != AUTO:
            flat["beta1"], flat["beta2"] = params["betas"]
        names = {
            "lr": "learning_rate",
            "eps": "adam_eps",
            "weight_decay": "weight_decay",
            "beta1": "adam_beta1",
            "beta2": "adam_beta2",
        }
        for key, given in flat.items():
            if given not in (AUTO, self.value(names[key])):
                self.override_setting(f"optimizer.params.{key}", given, names[key])
        rate = self.changes.get("learning_rate")
        if rate is not None and rate < self.config.min_lr and "min_lr" not in self.config.explicit:
            self.changes["min_lr"] = rate / 100  # as lumina.config.loading lowers a floor that nobody set
        self.report.append("optimizer: AdamW, built by Lumina without decay on norms and embeddings")

    def fill_precision(self, device_type: str, bf16_supported: bool | None) -> None:
        asked = {name: self.json.get(name, {}).get("enabled", AUTO) for name in ("fp16", "bf16")}
        on = [name for name, enabled in asked.items() if enabled is True]
        if len(on) == 2:
            raise UserError(f"{self.source}: fp16.enabled and bf16.enabled are both true", "Enable one of them.")
        ours = self.config.precision
        if on:
            if ours not in ("auto", on[0]):
                self.override_setting(f"{on[0]}.enabled", on[0], "precision")
            wanted = on[0]
        else:
            wanted = ours
        chosen = precision_rules.resolve(wanted, device_type, bf16_supported=bf16_supported)
        if asked.get(chosen, AUTO) is False:
            if ours == chosen:
                raise self.contradiction(f"{chosen}.enabled", "false", "precision", ours)
            # precision auto landed on a format that the JSON switches off: the next best that it leaves on.
            fallback = "fp16" if chosen == "bf16" and device_type != "cpu" and asked["fp16"] is not False else "fp32"
            chosen = precision_rules.resolve(fallback, device_type, bf16_supported=bf16_supported)
        for name in ("fp16", "bf16"):
            self.json.setdefault(name, {})["enabled"] = name == chosen
        self.changes["precision"] = chosen
        origin = f"{self.source}" if on else f"precision {ours} on {device_type}"
        self.report.append(f"precision = {chosen} (from {origin})")
        if chosen == "bf16" and device_type == "cpu":
            native = precision_rules.cpu_has_bf16() if bf16_supported is None else bf16_supported
            if not native:
                self.report.append("WARNING: this CPU has no bf16 instructions: fp32 (--precision auto) is far faster")

    def keep_overflow_checks(self) -> None:
        """Refuse or correct a JSON that switches DeepSpeed's overflow checks off: without the gradient norm, or the
        check of it, NaN would be written into the weights."""
        if self.json.get("zero_optimization", {}).get("compute_grad_norm", True) is False:
            raise UserError(
                f"{self.source}: zero_optimization.compute_grad_norm = false is not supported: steps whose gradients "
                "are not finite are refused by their norm",
                "Remove the key.",
            )
        if self.json["bf16"].get("check_grad_overflow", True) is False:
            self.json["bf16"]["check_grad_overflow"] = True
            self.report.append("bf16.check_grad_overflow = true (steps that are not finite are always refused)")

    def fill_batches(self, world: int) -> None:
        groups = max(1, world // self.config.sequence_parallel_size)  # ranks that share tokens have the same samples
        self.fill("train_micro_batch_size_per_gpu", "batch_size")
        micro = int(self.json["train_micro_batch_size_per_gpu"])
        total, accumulation = (self.json.get(k, AUTO) for k in ("train_batch_size", "gradient_accumulation_steps"))
        fixed = self.config.global_batch_size
        if total != AUTO:
            if fixed is not None and total not in (fixed, _padded(fixed, micro, groups)[1]):
                raise self.contradiction("train_batch_size", total, "global_batch_size", fixed)
            wanted = fixed if fixed is not None else int(total)
        elif fixed is not None:
            wanted = fixed
        else:
            self.fill("gradient_accumulation_steps", "gradient_accumulation_steps")
            wanted = micro * int(self.json["gradient_accumulation_steps"]) * groups
        steps, padded = _padded(wanted, micro, groups)
        if accumulation not in (AUTO, steps):
            raise UserError(
                f"{self.source}: gradient_accumulation_steps = {accumulation} does not fit a global batch of {wanted} "
                f"with micro-batches of {micro} on {world} processes (that takes {steps})",
                'Write "auto" for one of train_batch_size and gradient_accumulation_steps.',
            )
        ours = self.value("gradient_accumulation_steps")
        if steps != ours:
            if "gradient_accumulation_steps" in self.config.explicit and fixed is None:
                raise self.contradiction("train_batch_size", total, "gradient_accumulation_steps", ours)
            self.report.append(f"gradient_accumulation_steps = {steps} (global batch {wanted}, world size {world})")
        self.changes |= {"gradient_accumulation_steps": steps, "global_batch_size": wanted}
        self.json |= {"gradient_accumulation_steps": steps, "train_batch_size": padded // groups * world}
        kind = "processes" if groups == world else f"group(s) of {world // groups} processes"
        padding = f", {padded - wanted} of them padding of weight zero" if padded > wanted else ""
        self.report.append(
            f"train_batch_size = {padded} ({micro} per micro-batch x {steps} accumulation x {groups} {kind}{padding})"
        )

    def fill_zero(self, overlap: bool) -> None:
        """Sizes of ZeRO's buffers, and whether gradients are reduced beside the backward pass."""
        zero = self.json.setdefault("zero_optimization", {"stage": 0})
        stage = zero.get("stage", 0)
        rules: Json = {**zero_sizes(self.config), "overlap_comm": overlap}
        missing = ["reduce_bucket_size"] if stage else []
        if stage and overlap:
            missing.append("overlap_comm")
        if stage == 3:
            # Without the last two DeepSpeed keeps a billion gathered weights: all of most models.
            missing += ["stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"]
            missing += ["stage3_max_live_parameters", "stage3_max_reuse_distance"]
        for key in missing:
            zero.setdefault(key, AUTO)
        for key, value in rules.items():
            if zero.get(key) == AUTO:
                zero[key] = value
                origin = "ranks on GPUs" if key == "overlap_comm" else "the model's shape"
                self.report.append(f"zero_optimization.{key} = {str(value).lower()} (from {origin})")
        self.enlarge_reduce_bucket(zero, stage)

    def enlarge_reduce_bucket(self, zero: Json, stage: int) -> None:
        """Make `reduce_bucket_size` hold the largest tensor: DeepSpeed 0.19.8 reduces a gradient that is larger than
        the bucket where it lies, and under stage 2 frees it before the stream that reduces it has read it: with overlap
        the sums of the largest tensor could be wrong."""
        bucket, largest = zero.get("reduce_bucket_size", 500_000_000), largest_tensor(self.config)
        if stage in (1, 2) and zero.get("overlap_comm") is True and bucket < largest:
            zero["reduce_bucket_size"] = largest
            self.report.append(
                f"zero_optimization.reduce_bucket_size = {largest} (instead of {bucket}: the model's largest tensor, "
                "which overlap_comm needs to fit)"
            )


def largest_tensor(model: ModelConfig) -> int:
    """Elements of the largest weight: the token table, or one of a layer's fused projections, all experts' together."""
    h, d = model.hidden_size, model.head_dim
    feed_forward = 2 * h * model.ffn_size if model.expert_layers < model.num_layers else 0
    experts = 0 if model.experts is None else 2 * h * model.expert_size * model.experts.count
    return max(model.vocab_size * h, feed_forward, experts, h * d * (model.num_heads + 2 * model.num_kv_heads))


def zero_sizes(model: ModelConfig) -> dict[str, int]:
    """What "auto" stands for in ZeRO's buffer sizes, in elements. DeepSpeed's own defaults (5e8) allocate a gigabyte
    for any model."""
    layer = (model.num_parameters(False) - model.hidden_size) // model.num_layers
    table = model.vocab_size * model.hidden_size
    bucket = max(largest_tensor(model), min(model.num_parameters(), REDUCE_BUCKET))
    return {
        "reduce_bucket_size": bucket,
        # new weights come when nothing else runs: whole model in one go when it is small, at most 200 M elements
        "allgather_bucket_size": max(table, min(model.num_parameters(), 200_000_000)),
        # two layers ahead of the one that computes
        "stage3_prefetch_bucket_size": 2 * layer,
        # norms stay whole on every rank: gathering a vector costs a round trip and saves nothing
        "stage3_param_persistence_threshold": 2 * model.hidden_size,
        "stage3_max_live_parameters": max(2 * table, 4 * layer + table),
        "stage3_max_reuse_distance": max(2 * table, 4 * layer + table),
        "sub_group_size": 100_000_000,
    }


def _padded(wanted: int, micro: int, world: int) -> tuple[int, int]:
    """Accumulation steps and padded global batch for a wanted global batch."""
    per_rank = -(-wanted // world)
    steps = -(-per_rank // micro)
    return steps, micro * steps * world


def _refuse_leftover_auto(value: Any, source: str, path: str = "") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_leftover_auto(inner, source, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_leftover_auto(inner, source, f"{path}[{index}]")
    elif value == AUTO:
        raise UserError(f'{source}: Lumina has no rule to fill "auto" for {path}', "Give it a value, or remove it.")
