"""The decoder's settings: its shape, and what differs from family to family."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from lumina.config.registry import FAMILIES
from lumina.config.schema.experts import Experts
from lumina.config.schema.fields import (
    FFN_MULTIPLE,
    MIN_VOCAB,
    FamilyName,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Strict,
)


class RopeScaling(Strict):
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


class ModelConfig(Strict):
    """Shape of the decoder (Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU)."""

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    seq_length: Annotated[int, Field(ge=2)]
    vocab_size: PositiveInt = MIN_VOCAB
    intermediate_size: PositiveInt | None = None
    # transformers' model_type: in what the model differs from Llama's (lumina/model/families, or another package's).
    family: FamilyName = "llama"
    head_size: PositiveInt | None = None  # None: hidden_size / num_heads
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: PositiveFloat = 1e-5
    tie_word_embeddings: bool = True
    init_std: PositiveFloat = 0.02
    experts: Experts | None = None  # None: every layer is dense
    # Weights of the routers' losses in training (lumina.model.routing); without experts they say nothing.
    router_aux_loss_coef: NonNegativeFloat = 0.001
    router_z_loss_coef: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _experts_fit(self) -> ModelConfig:
        fault = FAMILIES.get(self.family).experts_fault(self)
        if fault is not None:
            raise ValueError(fault)
        return self

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
    def qk_norm_whole(self) -> bool:
        """Whether the queries of all heads are normed as one vector, and so the keys."""
        return bool(FAMILIES.get(self.family).qk_norm_whole)

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's feed-forward part is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def expert_layers(self) -> int:
        """How many layers have experts."""
        return 0 if self.experts is None else self.num_layers - len(self.experts.dense_layers)

    @property
    def expert_size(self) -> int:
        """Width of one expert."""
        return self.ffn_size if self.experts is None or self.experts.size is None else self.experts.size

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer: `intermediate_size`, or 8/3 of hidden_size rounded up to 64."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE

    def num_parameters(self, with_embeddings: bool = True, active: bool = False) -> int:
        """Exact count of parameters; without embeddings leaves out the token table and the output matrix; `active`
        counts of each layer's experts only the few that a token goes through."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * self.num_heads * 2 + h * d * self.num_kv_heads * 2
        attention += d * (self.num_heads + 2 * self.num_kv_heads) * self.qkv_bias
        attention += d * (self.num_heads + self.num_kv_heads if self.qk_norm_whole else 2 * self.qk_norm)
        body = self.num_layers * (attention + 2 * h) + h
        body += (self.num_layers - self.expert_layers) * 3 * h * self.ffn_size
        if self.experts is not None:
            used = self.experts.per_token if active else self.experts.count
            body += self.expert_layers * h * (self.experts.count + 3 * used * self.expert_size)
        tables = 1 if self.tie_word_embeddings else 2
        return body + (tables * self.vocab_size * h if with_embeddings else 0)
