"""Granite 3: Llama with multipliers of the embedding, the residual, attention scores and logits.

Reference: https://github.com/ibm-granite/granite-3.0-language-models; arXiv:2203.03466 for where they come from.
"""

from __future__ import annotations

from typing import Any

from lumina.config import ModelConfig, UserError
from lumina.model.families import Family


class _Granite(Family):
    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        divisor = values.pop("logits_scaling")
        if not isinstance(divisor, int | float) or not divisor > 0:
            raise UserError(f"logits_scaling {divisor} is not a number above 0")
        return {"logit_scale": 1 / divisor}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        return super().to_hf(config) | {"attention_multiplier": scale, "logits_scaling": 1 / config.logit_scale}


FAMILY = _Granite(
    "GraniteForCausalLM",
    settings=("rope_scaling", "embedding_multiplier", "residual_multiplier", "attention_scale", "logit_scale"),
    named={
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "attention_scale": "attention_multiplier",
    },
    defaults={
        "max_position_embeddings": 2048,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    keys={"attention_bias": False, "mlp_bias": False},
)
