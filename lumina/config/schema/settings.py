"""Settings of a run beside its model: optimisation, adapters, data, health, saving, monitoring."""

# ruff: noqa: RUF012  (pydantic copies a default list for each object)

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from lumina.config.columns import Columns
from lumina.config.schema.fields import (
    ChatTemplate,
    FormatName,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    ObjectiveName,
    PositiveFloat,
    PositiveInt,
    RuleName,
    RunName,
    ScheduleName,
    Strict,
    TrackerName,
)


class OptimConfig(Strict):
    """Optimisation: objective, batch sizes, AdamW, learning rates, precision. `batch_size` is the micro-batch: samples
    per device and accumulation step."""

    # sft: the assistant's words in conversations. dpo: preference pairs (arXiv:2305.18290), over the model that the run
    # began with.
    objective: ObjectiveName = "sft"
    dpo_beta: PositiveFloat = 0.1

    learning_rate: PositiveFloat = 1e-4
    batch_size: PositiveInt = 2
    gradient_accumulation_steps: PositiveInt = 4
    # None: batch_size * gradient_accumulation_steps * the ranks that read data of their own (world size /
    # sequence_parallel_size) at the run's first start, kept when it resumes.
    global_batch_size: PositiveInt | None = None
    max_grad_norm: NonNegativeFloat = 1.0  # 0 switches clipping off
    weight_decay: NonNegativeFloat = 0.01
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: PositiveFloat = 1e-8
    epochs: PositiveInt = 10
    max_steps: PositiveInt | None = None
    lr_scheduler: ScheduleName = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    min_lr: NonNegativeFloat = 1e-6
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    deterministic: bool = False  # the same bits at every run on a GPU too, for a slower backward pass of attention
    # The blocks' matrix products in 8 bits, scaled by tensor or by row (docs/gpu.md); None: in `precision`.
    float8: Literal["tensorwise", "rowwise"] | None = None
    # False: keep every activation. True: recompute every layer. n: recompute every nth layer.
    gradient_checkpointing: bool | PositiveInt = False
    # The inputs of recomputed layers wait in the host's memory for the backward pass (docs/long-context.md).
    activation_offloading: bool = False
    # The feed-forward so many tokens at a time, computed again in the backward pass (docs/long-context.md); None: all.
    mlp_tile_tokens: PositiveInt | None = None
    # Attention for a group of heads at a time, of so many groups (docs/long-context.md); 1: for all at once.
    attention_head_groups: PositiveInt = 1
    # Neighbouring ranks that share each micro-batch's tokens (docs/long-context.md); 1: every rank has its own.
    sequence_parallel_size: PositiveInt = 1
    early_stopping_patience: PositiveInt | None = None
    seed: NonNegativeInt = 1234

    @model_validator(mode="after")
    def _floor_below_peak(self) -> OptimConfig:
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr:g} is above learning_rate {self.learning_rate:g}")
        return self

    @model_validator(mode="after")
    def _offloads_what_is_recomputed(self) -> OptimConfig:
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError(
                "activation_offloading is of the inputs of recomputed layers: set gradient_checkpointing too"
            )
        return self

    @property
    def checkpoint_every(self) -> int:
        """0 when no layer is recomputed in the backward pass, n when every nth layer is."""
        return int(self.gradient_checkpointing)


# The projections of a layer, under the names that transformers gives them.
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


class LoraConfig(Strict):
    """Low-rank adapters over the frozen weights of another run (arXiv:2106.09685): each projection's output gains
    lora_alpha / lora_rank * B A dropout(x), and only A (rank x inputs) and B (outputs x rank) are trained and saved."""

    lora_rank: NonNegativeInt = 0  # 0: every weight is trained
    lora_alpha: PositiveFloat | None = None  # None: twice the rank
    lora_dropout: Fraction = 0.0
    lora_targets: Annotated[list[Projection], Field(min_length=1)] = list(PROJECTIONS)

    @model_validator(mode="after")
    def _each_target_once(self) -> LoraConfig:
        if len(set(self.lora_targets)) < len(self.lora_targets):
            raise ValueError("lora_targets names a projection twice")
        return self

    @property
    def lora_scale(self) -> float:
        """What B A is multiplied by."""
        assert self.lora_rank
        return (2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha) / self.lora_rank


class DataSource(Strict):
    """A training file (or pattern), how often an epoch takes its conversations (0.3 is three tenths of them), and what
    each of its records has to be (unset: found from its keys, record by record)."""

    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(ge=0.0, le=1000.0, allow_inf_nan=False)] = 1.0
    format: FormatName | None = None
    columns: Columns | None = None  # unset: those of `columns`

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, values: Any) -> Any:
        return {"path": values} if isinstance(values, str) else values


class DataConfig(Strict):
    """Data: training and evaluation files, splits, deduplication, packing."""

    train_data: list[str] = []
    data: list[DataSource] = []  # training files too, with weights
    eval_data: list[str] = []
    columns: Columns = {}  # {prompt: question}: what a data format calls prompt stands in the column question
    packing: bool = True
    overlong: Literal["split", "truncate", "drop"] = "split"
    # The share of seq_length that the system message and the end of the question take of each chunk after the first.
    overlong_context: Annotated[float, Field(ge=0.0, le=0.5)] = 0.25
    cache_dir: str | None = None
    num_workers: PositiveInt | None = None  # None: one per core this process may use
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # held out of train_data when eval_data is empty
    dedup: Literal["none", "exact", "near"] = "none"  # removed within and across both sets
    # An imported model's folder of tokenizer.json and chat template, looked for beside the YAML file first; None:
    # Lumina's own. --init-from fills it in.
    tokenizer: str | None = None
    # Lumina's own chat template; None: the newest for a new run, what it was taught for a model that is there already.
    chat_template: ChatTemplate | None = None

    @model_validator(mode="after")
    def _one_template(self) -> DataConfig:
        if self.tokenizer is not None and self.chat_template is not None:
            raise ValueError(f"chat_template {self.chat_template} is Lumina's own: the tokenizer brings another")
        return self


class RunConfig(Strict):
    """The run: its name and folder, what it starts from, intervals of evaluation and saving, timeouts."""

    model_name: str = "lumina"
    experiment_name: RunName = "experiment"
    output_dir: Annotated[str, Field(min_length=1)] = "experiments"
    resume: str | None = None  # auto, a run's folder, or a checkpoint
    init_from: str | None = None
    # The longest context that those weights were trained at; --init-from fills it in.
    trained_seq_length: PositiveInt | None = None
    ds_config: str | None = None
    eval_every_n_batches: PositiveInt = 500
    save_every_n_batches: PositiveInt = 1000
    health_check_interval: PositiveInt = 100
    hang_timeout: NonNegativeFloat = 600.0  # seconds without progress before a rank dumps its stacks and ends; 0: never
    stop_timeout: NonNegativeFloat = 60.0  # the same once a signal has asked the run to stop
    straggler_interval: NonNegativeInt = 50  # steps between comparisons of the ranks' times; 0: never
    straggler_factor: PositiveFloat = 1.5  # a rank that takes this many times the median is named
    keep_last: PositiveInt = 3


class HealthConfig(Strict):
    """What the health monitor watches for and what is done about it (docs/health.md). A baseline is the median and the
    median absolute deviation over the last `health_window` steps, never with the current value in it."""

    health_window: Annotated[int, Field(ge=8)] = 128  # steps in a baseline
    health_warmup: Annotated[int, Field(ge=4)] = 32  # values a baseline needs before anything is judged by it
    disabled_rules: list[RuleName] = []  # rules that are not to be checked, by name
    # What rules of other packages are set to, by rule: {loss-above: {limit: 9.0}}.
    rule_settings: dict[RuleName, dict[str, Any]] = {}
    # A loss this many robust standard deviations (1.4826 MAD, at least a tenth of the median) above its baseline.
    spike_deviations: PositiveFloat = 10.0
    grad_explosion_factor: Annotated[float, Field(gt=1)] = 10.0  # gradient norm over its median
    grad_vanishing_factor: Fraction = 0.001  # gradient norm over its median, 8 steps in a row
    plateau_steps: PositiveInt = 4000  # the loss compared over the two halves of this many steps
    plateau_gain: NonNegativeFloat = 0.001  # relative fall of the loss below which it is a plateau
    divergence_evaluations: Annotated[int, Field(ge=2)] = 3  # evaluations that rise in a row while training loss falls
    loss_scale_floor: NonNegativeFloat = 16.0  # fp16: a dynamic loss scale below this has collapsed
    layer_stats_every: NonNegativeInt = 100  # steps between per-layer statistics; 0: none
    layer_dead_fraction: Fraction = 1e-6  # gradient norm over the layers' median, two measurements in a row
    layer_update_ratio: PositiveFloat = 0.5  # norm of a layer's update over that of its weights: it explodes
    layer_gradient_factor: Annotated[float, Field(gt=1)] = 30.0  # gradient norm over the layer's own median: the same
    throughput_fall: Fraction = 0.5  # of the median tokens/s, 16 steps in a row
    data_wait_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2  # of the step's time, median over the baseline
    memory_growth: PositiveFloat = 0.25  # over the median after warm-up
    disk_free_checkpoints: NonNegativeFloat = 3.0  # free space below this many checkpoints
    gpu_temperature: PositiveFloat = 87.0  # degrees Celsius
    # Recovery.
    on_spike: Literal["skip", "warn"] = "skip"  # a spiking step's update is skipped, or only reported
    rollback_after: NonNegativeInt = 3  # skipped steps within health_check_interval that roll the run back; 0: never
    max_rollbacks: NonNegativeInt = 3  # then the run ends with a clear failure
    on_oom: Literal["halve_micro_batch", "fail"] = "halve_micro_batch"  # at the same global batch
    on_corrupt_sample: Literal["zero_weight", "fail"] = "zero_weight"  # of a sample that cannot be read
    emergency_checkpoint: bool = True  # saved when an exception ends the run and the state is valid
    emergency_seconds: PositiveFloat = 60.0  # how long it may take; the ranks have ten seconds of it to agree


class SavingConfig(Strict):
    """How checkpoints and backups are written."""

    save_async: bool = True  # written by a thread from a copy of the state, beside the training
    save_timeout_minutes: PositiveFloat = 10.0  # a save that takes longer has failed
    backup_dir: str | None = None  # another disk: backups go to BACKUP_DIR/EXPERIMENT_NAME
    backup_every_n_batches: PositiveInt | None = None  # steps between backups
    backup_every_minutes: PositiveFloat | None = None  # or minutes
    backup_keep_last: PositiveInt = 3  # newest backups to keep
    backup_keep_every: PositiveInt | None = None  # and those whose step is a multiple of this
    backup_keep_best: bool = True  # and the best one

    @model_validator(mode="after")
    def _backups_have_a_place(self) -> SavingConfig:
        rhythm = self.backup_every_n_batches is not None or self.backup_every_minutes is not None
        if rhythm != (self.backup_dir is not None):
            raise ValueError("backups need backup_dir and backup_every_n_batches or backup_every_minutes")
        return self


class MonitorConfig(Strict):
    """What is shown and kept of a run (docs/monitoring.md)."""

    trackers: list[TrackerName] = []
    system_metrics_seconds: NonNegativeFloat = 15.0  # between measurements of processor, memory, disk, network; 0: none
    sample_prompts: list[str] = []  # answered at each evaluation, greedily
    sample_tokens: PositiveInt = 32  # longest answer
    live_view: bool = True  # in a terminal; the log's lines elsewhere
    profile: bool = False  # trace a few early steps with torch's profiler
