"""Model family: what differs between decoders, and which one a configuration or a config.json names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lumina.config import FAMILIES, ModelConfig, Structure, UserError
from lumina.model.families.common import config_json
from lumina.model.fused import RowSlice, projections

if TYPE_CHECKING:
    from torch import Tensor

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NORMS = {
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
_PRE_NORMS = _NORMS | {"feed_forward_norm": "post_attention_layernorm"}  # where there is no other norm between
_OWNERS = {"attention": "self_attn", "feed_forward": "mlp"}


@dataclass(frozen=True)
class Family(Structure):
    """A decoder of Llama's shape but for what is said here (in Structure's fields too), under the names that
    transformers uses.

    model_class: transformers' class for it. settings: those of lumina.config's FAMILY_SETTINGS that its models may
    have; others are refused. named: keys of its config.json that are such a setting, by the setting. defaults: what
    transformers takes for a key that config.json leaves out (a null is another thing). keys: what its config.json says
    beside the common part; all of it means "as this model does it".
    """

    model_class: str
    settings: Collection[str] = ("rope_scaling",)
    named: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)

    # --- Weights ----------------------------------------------------------------------------------

    def tensors(self, ours: str, config: ModelConfig) -> list[RowSlice]:
        """transformers' tensors that make up our parameter `ours`, in order of rows."""
        if ours in _OUTSIDE:
            return [RowSlice(_OUTSIDE[ours], config.hidden_size if ours == "norm.weight" else config.vocab_size)]
        _, layer, rest = ours.split(".", 2)
        place, kind = rest.rsplit(".", 1)
        prefix = f"model.layers.{layer}"
        if place in _NORMS:
            names = _PRE_NORMS if self.arrangement == "pre-norm" else _NORMS
            return [RowSlice(f"{prefix}.{names[place]}.{kind}", self._norm_width(place, config))]
        owner = _OWNERS[place.partition(".")[0]]
        return [RowSlice(f"{prefix}.{owner}.{name}.{kind}", rows) for name, rows in projections(config)[place]]

    def _norm_width(self, place: str, config: ModelConfig) -> int:
        if not place.startswith("attention."):
            return config.hidden_size
        heads = config.num_heads if place == "attention.q_norm" else config.num_kv_heads
        return config.head_dim * (heads if self.qk_norm == "width" else 1)

    def layouts(self, ours: str, config: ModelConfig) -> list[list[RowSlice]]:
        """The ways in which files hold our parameter `ours`, that of released models first; one tensor with all rows of
        a stack of matrices has the stack's shape."""
        return [self.tensors(ours, config)]

    def split(self, ours: str, weight: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """One of our parameters as (name, tensor) pairs of transformers; the tensors are views."""
        theirs = self.tensors(ours, config)
        if weight.ndim == 3:  # a stack of matrices, whose rows are counted through
            weight = weight.flatten(0, 1)
        pieces = weight.split([t.rows for t in theirs])  # type: ignore[no-untyped-call]
        yield from zip((t.name for t in theirs), pieces, strict=True)

    def experts_fault(self, config: ModelConfig) -> str | None:
        """What is wrong with the experts of a configuration of this family, None if nothing is."""
        return None if config.experts is None else f"family {config.family} has no experts"

    # --- config.json ------------------------------------------------------------------------------

    def from_hf(self, values: dict[str, Any]) -> ModelConfig:
        """Our configuration of a config.json. Raises UserError, naming what this model cannot represent."""
        values = dict(self.defaults) | values
        ours = {setting: values.pop(key) for setting, key in self.named.items() if key in values}
        return config_json.read(values, ours | self.settings_of(values), self.named)

    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        """Our settings that keys of the family alone say in another form. Takes these keys out of `values`, which has
        the defaults filled in."""
        return {}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """What config.json says of the model, as every release of transformers that knows the family reads it."""
        named = {key: getattr(config, setting) for setting, key in self.named.items()}
        return config_json.write(config) | {"architectures": [self.model_class], **self.keys, **named}

    def hf_config(
        self, config: ModelConfig, dtype: str, stop_id: int | list[int], pad_id: int | None
    ) -> dict[str, Any]:
        """All of config.json: the model, the type of its weights and the tokens that end and pad a text."""
        return self.to_hf(config) | {
            "bos_token_id": None,
            "eos_token_id": stop_id,
            "pad_token_id": pad_id,
            "torch_dtype": dtype,
            "use_cache": True,
        }


def family_of(config: ModelConfig) -> Family:
    """The configuration's family."""
    found: Family = FAMILIES.get(config.family)
    return found


def read_hf_config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of any family's config.json. Raises UserError: a family that is not known, or what this model
    cannot represent."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES.names():
        known = "\n".join(f"  {each}: {FAMILIES.summary(each)}" for each in FAMILIES.names())
        raise UserError(f"model_type {name} is not supported", f"Supported are\n{known}")
    family: Family = FAMILIES.get(name)
    return family.from_hf(values)
