"""What Gemma 2 and 3 share: norms before and after each sublayer with weights around 0, GELU, an embedding as long as
the residual stream, and a window in most layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lumina.config import ModelConfig, UserError
from lumina.model.families.common import config_json
from lumina.model.families.common.family import Family

PATTERN = "sliding_window_pattern"
_ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class Gemma(Family):
    arrangement: Literal["pre-norm", "post-norm", "sandwich"] = "sandwich"
    norm_offset: float = 1.0
    activation: Literal["silu", "gelu_tanh"] = "gelu_tanh"
    embedding_by_width: bool = True

    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        values.pop("hidden_act", None)  # not looked at, in transformers either
        activation = values.pop("hidden_activation", _ACTIVATION)
        if activation != _ACTIVATION:
            raise UserError(f"hidden_activation {activation} is not supported, only {_ACTIVATION}")
        if values.pop("use_bidirectional_attention", False):
            raise UserError("use_bidirectional_attention is not supported: this model's attention is causal")
        # Of so many layers the last one sees all, the others a window; Gemma 2 does not read the key.
        period = values.pop(PATTERN) if PATTERN in self.defaults else 2
        scalar = values.pop("query_pre_attn_scalar")
        if type(scalar) is not int or scalar <= 0 or type(period) is not int or period <= 0:
            raise UserError(f"query_pre_attn_scalar {scalar} and {PATTERN} {period} are not whole numbers")
        count = config_json.count_of_layers(values)
        kinds = [config_json.FULL if (i + 1) % period == 0 else config_json.SLIDING for i in range(count)]
        return {"attention_scale": scalar**-0.5, **config_json.windows(values, kinds)}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        scalar = round(scale**-2)
        if scalar**-0.5 != scale:
            raise UserError(
                f"attention_scale {scale} has no form in config.json of {config.family}",
                "It is 1 / sqrt(query_pre_attn_scalar) there, of a whole number.",
            )
        return super().to_hf(config) | {
            "hidden_act": _ACTIVATION,
            "hidden_activation": _ACTIVATION,
            "query_pre_attn_scalar": scalar,
            "layer_types": config_json.layer_types(config),
            "sliding_window": config.sliding_window or config.seq_length,
        }
