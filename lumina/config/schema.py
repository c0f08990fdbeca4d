"""Every setting of a run, with its type, its default and its bounds.

The classes are mixins of one flat `Config`, so that YAML keys stay flat (the early README's work verbatim) while a room
can ask for only the part that it needs: the model takes a `ModelConfig`, tests build one without a data path.

Units: lengths in tokens, batch sizes in samples, "batch" in `*_every_n_batches` is one global batch, that is one
optimizer step.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from lumina.config.columns import Columns
from lumina.config.registry import FAMILIES, FORMATS, HEALTH_RULES, OBJECTIVES, SCHEDULES, TRACKERS

# What the tokenizer needs: cl100k_base and the special tokens above it, padded to a multiple of 128. lumina.chat owns
# the number; it is repeated here so that reading a configuration loads no tokenizer (a test holds the two together).
MIN_VOCAB = 100_352

# Lumina's own chat templates, the oldest first (lumina.chat.TEMPLATES, for the same reason).
ChatTemplate = Literal["im-roles-1", "im-roles-2"]
FIRST_TEMPLATE: ChatTemplate = "im-roles-1"  # of every run that records none

FFN_MULTIPLE = 64  # rows of the feed-forward matrices are a multiple of this: whole tiles on tensor cores

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
FormatName = Annotated[str, AfterValidator(FORMATS.check)]
ScheduleName = Annotated[str, AfterValidator(SCHEDULES.check)]
ObjectiveName = Annotated[str, AfterValidator(OBJECTIVES.check)]
RuleName = Annotated[str, AfterValidator(HEALTH_RULES.check)]
TrackerName = Annotated[str, AfterValidator(TRACKERS.check)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _lists_of_one(cls, values: Any) -> Any:
        """A text or a mapping where a list of them is meant is the list of that one."""
        if not isinstance(values, dict):
            return values
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        return {name: [v] if name in lists and isinstance(v, str | dict) else v for name, v in values.items()}


class RopeScaling(_Strict):
    """RoPE scaling: slower rotary angles for contexts longer than a model was first trained on. `linear` divides every
    frequency by `factor` (arXiv:2306.15595); `llama3` only those that turn fewer than `low_freq_factor` times within
    `original_max_position_embeddings` tokens, none that turn more than `high_freq_factor` times, and those between in
    part (Llama 3.1). The names are transformers'."""

    type: Literal["linear", "llama3"]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    # original_window in plain safetensors that 0.1.0 exported, whose card builds a ModelConfig of lumina.json.
    original_max_position_embeddings: PositiveInt | None = Field(
        None, validation_alias=AliasChoices("original_max_position_embeddings", "original_window")
    )

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.type == "llama3" and (
            low is None or high is None or self.original_max_position_embeddings is None or low >= high
        ):
            raise ValueError("llama3 needs original_max_position_embeddings and low_freq_factor below high_freq_factor")
        return self


class ModelConfig(_Strict):
    """Shape of the decoder (Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU)."""

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    seq_length: Annotated[int, Field(ge=2)]
    vocab_size: PositiveInt = MIN_VOCAB
    intermediate_size: PositiveInt | None = None
    # transformers' model_type: in what the model differs from Llama's (lumina/model/families, or another package's).
    family: Annotated[str, AfterValidator(FAMILIES.check)] = "llama"
    head_size: PositiveInt | None = None  # None: hidden_size / num_heads
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: PositiveFloat = 1e-5
    tie_word_embeddings: bool = True
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            of = "hidden_size / num_heads" if self.head_size is None else "head_size"
            raise ValueError(f"{of} is {self.head_dim}: rotary positions need an even head size")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads if self.head_size is None else self.head_size

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return bool(FAMILIES.get(self.family).qkv_bias)

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normed."""
        return bool(FAMILIES.get(self.family).qk_norm)

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer: `intermediate_size`, or 8/3 of hidden_size rounded up to 64."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE

    def num_parameters(self, with_embeddings: bool = True) -> int:
        """Exact count of parameters; without embeddings leaves out the token table and the output matrix."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * self.num_heads * 2 + h * d * self.num_kv_heads * 2
        attention += d * (self.num_heads + 2 * self.num_kv_heads) * self.qkv_bias + 2 * d * self.qk_norm
        layer = attention + 3 * h * self.ffn_size + 2 * h
        body = self.num_layers * layer + h
        tables = 1 if self.tie_word_embeddings else 2
        return body + (tables * self.vocab_size * h if with_embeddings else 0)


class OptimConfig(_Strict):
    """Optimisation: objective, batch sizes, AdamW, learning rates, precision. `batch_size` is the micro-batch: samples
    per device and accumulation step."""

    # sft: the assistant's words in conversations. dpo: preference pairs (arXiv:2305.18290), over the model that the run
    # began with.
    objective: ObjectiveName = "sft"
    dpo_beta: PositiveFloat = 0.1

    learning_rate: PositiveFloat = 1e-4
    batch_size: PositiveInt = 2
    gradient_accumulation_steps: PositiveInt = 4
    # None: batch_size * gradient_accumulation_steps * world size at the run's first start, kept when it resumes.
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
    early_stopping_patience: PositiveInt | None = None
    seed: NonNegativeInt = 1234

    @model_validator(mode="after")
    def _floor_below_peak(self) -> OptimConfig:
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr:g} is above learning_rate {self.learning_rate:g}")
        return self

    @property
    def checkpoint_every(self) -> int:
        """0 when no layer is recomputed in the backward pass, n when every nth layer is."""
        return int(self.gradient_checkpointing)


# The projections of a layer, under the names that transformers gives them.
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


class LoraConfig(_Strict):
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


class DataSource(_Strict):
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


class DataConfig(_Strict):
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


class RunConfig(_Strict):
    """The run: its name and folder, what it starts from, intervals of evaluation and saving, timeouts."""

    model_name: str = "lumina"
    experiment_name: Annotated[str, Field(min_length=1)] = "experiment"
    output_dir: Annotated[str, Field(min_length=1)] = "experiments"
    resume: str | None = None  # auto, a run's folder, or a checkpoint
    init_from: str | None = None
    ds_config: str | None = None
    eval_every_n_batches: PositiveInt = 500
    save_every_n_batches: PositiveInt = 1000
    health_check_interval: PositiveInt = 100
    hang_timeout: NonNegativeFloat = 600.0  # seconds without progress before a rank dumps its stacks and ends; 0: never
    stop_timeout: NonNegativeFloat = 60.0  # the same once a signal has asked the run to stop
    straggler_interval: NonNegativeInt = 50  # steps between comparisons of the ranks' times; 0: never
    straggler_factor: PositiveFloat = 1.5  # a rank that takes this many times the median is named
    keep_last: PositiveInt = 3


class HealthConfig(_Strict):
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


class SavingConfig(_Strict):
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


class MonitorConfig(_Strict):
    """What is shown and kept of a run (docs/monitoring.md)."""

    trackers: list[TrackerName] = []
    system_metrics_seconds: NonNegativeFloat = 15.0  # between measurements of processor, memory, disk, network; 0: none
    sample_prompts: list[str] = []  # answered at each evaluation, greedily
    sample_tokens: PositiveInt = 32  # longest answer
    live_view: bool = True  # in a terminal; the log's lines elsewhere
    profile: bool = False  # trace a few early steps with torch's profiler


GROUPS: tuple[type[_Strict], ...] = (
    ModelConfig,
    OptimConfig,
    LoraConfig,
    DataConfig,
    RunConfig,
    HealthConfig,
    SavingConfig,
    MonitorConfig,
)


class Config(ModelConfig, OptimConfig, LoraConfig, DataConfig, RunConfig, HealthConfig, SavingConfig, MonitorConfig):
    """Every setting, flat. Build one with `lumina.config.loading`, which knows presets, files, flags and where each
    value came from."""

    _explicit: frozenset[str] = PrivateAttr(default=frozenset())

    @property
    def explicit(self) -> frozenset[str]:
        """Names of the settings that the user wrote down (YAML, flag or --set), as against presets and defaults."""
        return self._explicit

    @classmethod
    def create(cls, values: dict[str, Any], explicit: frozenset[str] | set[str]) -> Config:
        """Validate `values`; raises pydantic.ValidationError (lumina.config.loading turns that into a UserError)."""
        config = cls(**values)
        config._explicit = frozenset(explicit)
        return config

    def replace(self, **changes: Any) -> Config:
        """A validated copy with some values changed, which remembers the same explicit names."""
        return Config.create(self.model_dump() | changes, self._explicit)

    def values(self) -> dict[str, Any]:
        """Every value by name, in the order in which the groups are written above."""
        dumped = self.model_dump()
        return {name: dumped[name] for group in GROUPS for name in group.model_fields}

    def to_yaml(self, *without: str) -> str:
        """Every value as YAML that `load` reads back to an equal configuration, but for `resume`, which belongs to one
        start, and what else is to be left out."""
        kept = {name: value for name, value in self.values().items() if name not in ("resume", *without)}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
