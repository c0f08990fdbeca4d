"""The decoder's settings: its shape, and what differs from family to family.

A family alone decides some of it (`Structure`: where norms stand, which activation); the rest are numbers that differ
between models of one family, and are settings. Their defaults are Llama's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal, NamedTuple

from pydantic import AliasChoices, ConfigDict, Field, model_validator

from lumina.config.registry import FAMILIES
from lumina.config.schema.experts import Experts
from lumina.config.schema.fields import (
    FFN_MULTIPLE,
    MIN_VOCAB,
    FamilyName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Strict,
)


class RopeScaling(Strict):
    """RoPE scaling: slower rotary angles for contexts longer than a model was first trained on. The names are
    transformers'. With "turns" those of a frequency within `original_max_position_embeddings` tokens:

    linear   divides every frequency by `factor` (arXiv:2306.15595)
    llama3   only those below `low_freq_factor` turns, none above `high_freq_factor`, those between in part (Llama 3.1)
    yarn     only those below `beta_slow` turns, none above `beta_fast`, those between in part, between whole numbers of
             dimensions if `truncate`; cosines and sines are multiplied by `attention_factor`, 0.1 ln(factor) + 1 where
             that is unset (arXiv:2309.00071)
    dynamic  none within the context length, which is as far as Lumina's positions go; transformers slows them beyond
    """

    model_config = ConfigDict(frozen=True)

    type: Literal["linear", "llama3", "yarn", "dynamic"]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    # original_window in plain safetensors that 0.1.0 exported, whose card builds a ModelConfig of lumina.json.
    original_max_position_embeddings: PositiveInt | None = Field(
        None, validation_alias=AliasChoices("original_max_position_embeddings", "original_window")
    )
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    truncate: bool = True

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.type == "llama3" and (
            low is None or high is None or self.original_max_position_embeddings is None or low >= high
        ):
            raise ValueError("llama3 needs original_max_position_embeddings and low_freq_factor below high_freq_factor")
        if self.type == "yarn" and (self.original_max_position_embeddings is None or self.beta_slow > self.beta_fast):
            raise ValueError("yarn needs original_max_position_embeddings and beta_slow not above beta_fast")
        return self


class Rope(NamedTuple):
    """Rotary positions of a layer: the first `width` numbers of each head are rotated. wide: angles in float64."""

    width: int
    theta: float
    scaling: RopeScaling | None
    wide: bool


class Layer(NamedTuple):
    """What layers of one model differ in. window: how many keys a query sees, its own the last; None: all of its past.
    rope: None for a layer without rotary positions (arXiv:2305.19466)."""

    window: int | None
    rope: Rope | None


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What of a decoder its family alone decides. The defaults are Llama's.

    arrangement: a block's two sublayers are attention and feed-forward. pre-norm: each reads the normed residual and
        adds to it (arXiv:2002.04745). post-norm: each reads the residual, and its output is normed before it is added
        (OLMo 2). sandwich: both (Gemma 2).
    norm_offset: what is added to a norm's weight before it multiplies.
    qkv_bias: biases of queries, keys and values.
    qk_norm: a norm of queries and keys: over each head, or over all heads together (width).
    activation: of the feed-forward's gate: SiLU, or GELU by its tanh approximation.
    embedding_by_width: the embedding is multiplied by the root of its width.
    """

    arrangement: Literal["pre-norm", "post-norm", "sandwich"] = "pre-norm"
    norm_offset: float = 0.0
    qkv_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_by_width: bool = False

    @property
    def is_llamas(self) -> bool:
        return all(getattr(self, each.name) == each.default for each in fields(Structure))


#: Contexts that are longer have rotary angles in float64: in float32, as transformers computes them, cosines are off by
#: 0.01 at this position, 0.07 at 1 M and 1.1 at 16 M, and positions above 2^24 lose their odd numbers.
_FLOAT32_POSITIONS = 2**17

#: Norms of width hidden_size in a block.
_NORMS = {"pre-norm": 2, "post-norm": 2, "sandwich": 4}

#: Settings that only some families have; a family names its own (Family.settings).
FAMILY_SETTINGS = (
    *("rope_scaling", "partial_rotary_factor", "nope_layers"),
    *("sliding_window", "sliding_layers", "sliding_rope_theta"),
    *("attention_scale", "attention_softcap", "logit_softcap"),
    *("embedding_multiplier", "residual_multiplier", "logit_scale"),
)


class ModelConfig(Strict):
    """Shape of the decoder (Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU), and its family."""

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
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0  # of each head, from its beginning
    nope_layers: list[NonNegativeInt] | None = None  # layers without rotary positions
    sliding_window: PositiveInt | None = None  # keys that a query sees, its own the last
    sliding_layers: list[NonNegativeInt] | None = None  # layers with the window; None: all
    sliding_rope_theta: PositiveFloat | None = None  # of those layers, which are then not scaled; None: as the others
    attention_scale: PositiveFloat | None = None  # of q k^T; None: 1 / sqrt(head width)
    attention_softcap: PositiveFloat | None = None  # scores become cap * tanh(score / cap)
    logit_softcap: PositiveFloat | None = None  # the same for the output's logits
    embedding_multiplier: PositiveFloat = 1.0
    residual_multiplier: PositiveFloat = 1.0  # of what each sublayer adds to the residual
    logit_scale: PositiveFloat = 1.0
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
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(f"partial_rotary_factor rotates {self.rotary_dim} of {self.head_dim}, not an even number")
        return self

    @model_validator(mode="after")
    def _layers_are_there(self) -> ModelConfig:
        for name in ("nope_layers", "sliding_layers"):
            layers = getattr(self, name) or []
            if layers != sorted(set(layers)) or (layers and layers[-1] >= self.num_layers):
                raise ValueError(f"{name} {layers} are not layers from 0 to {self.num_layers - 1} in ascending order")
        if self.sliding_layers == []:
            raise ValueError("sliding_layers [] names no layer: leave sliding_window out")
        for name in ("sliding_layers", "sliding_rope_theta"):
            if self.sliding_window is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs sliding_window")
        return self

    @model_validator(mode="after")
    def _family_has_it(self) -> ModelConfig:
        set_ = [name for name in FAMILY_SETTINGS if getattr(self, name) != type(self).model_fields[name].default]
        lacking = [name for name in set_ if name not in FAMILIES.get(self.family).settings] if set_ else []
        if lacking:
            having = ", ".join(name for name in FAMILIES.names() if lacking[0] in FAMILIES.get(name).settings)
            raise ValueError(f"the family {self.family} has no {lacking[0]}; those that have: {having}")
        return self

    @property
    def structure(self) -> Structure:
        """What the family decides."""
        family: Structure = FAMILIES.get(self.family)
        return family

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads if self.head_size is None else self.head_size

    @property
    def rotary_dim(self) -> int:
        """How much of a head's width is rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def layers(self) -> list[Layer]:
        """Each layer's window and rotary positions. A window that no position exceeds is none."""
        window = self.sliding_window if self.sliding_window and self.sliding_window < self.seq_length else None
        nope, sliding = set(self.nope_layers or ()), self.sliding_layers
        wide = self.seq_length > _FLOAT32_POSITIONS
        far = near = Rope(self.rotary_dim, self.rope_theta, self.rope_scaling, wide)
        if self.sliding_rope_theta is not None:
            near = Rope(self.rotary_dim, self.sliding_rope_theta, None, wide)
        found = []
        for layer in range(self.num_layers):
            slides = self.sliding_window is not None and (sliding is None or layer in sliding)
            rope = None if layer in nope else near if slides else far
            found.append(Layer(window if slides else None, rope))
        return found

    @property
    def embedding_scale(self) -> float:
        """What the embedding is multiplied by."""
        return self.embedding_multiplier * (math.sqrt(self.hidden_size) if self.structure.embedding_by_width else 1.0)

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

    @property
    def norm_widths(self) -> list[int]:
        """Widths of a block's norms: its sublayers', then those of queries and keys."""
        of = {None: 0, "head": 1, "width": self.num_heads}, {None: 0, "head": 1, "width": self.num_kv_heads}
        heads = [self.head_dim * kinds[self.structure.qk_norm] for kinds in of]
        return [self.hidden_size] * _NORMS[self.structure.arrangement] + [width for width in heads if width]

    def num_parameters(self, with_embeddings: bool = True, active: bool = False) -> int:
        """Exact count of parameters; without embeddings leaves out the token table and the output matrix; `active`
        counts of each layer's experts only the few that a token goes through."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * self.num_heads * 2 + h * d * self.num_kv_heads * 2
        attention += d * (self.num_heads + 2 * self.num_kv_heads) * self.structure.qkv_bias
        body = self.num_layers * (attention + sum(self.norm_widths)) + h
        body += (self.num_layers - self.expert_layers) * 3 * h * self.ffn_size
        if self.experts is not None:
            used = self.experts.per_token if active else self.experts.count
            body += self.expert_layers * h * (self.experts.count + 3 * used * self.expert_size)
        tables = 1 if self.tie_word_embeddings else 2
        return body + (tables * self.vocab_size * h if with_embeddings else 0)
