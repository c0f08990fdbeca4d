"""Gemma 3 without its eyes: Gemma 2 with normed queries and keys, and rotary positions of their own in sliding layers.

Reference: arXiv:2503.19786. The folders of models with vision (model_type gemma3) are another family.
"""

from __future__ import annotations

import json
from typing import Any

from lumina.config import ModelConfig, UserError
from lumina.model.families.common import config_json
from lumina.model.families.common.gemma import PATTERN, Gemma

_NEAR = "rope_local_base_freq"


class _Gemma3(Gemma):
    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        theta = values.pop(_NEAR)
        by_kind, scaling = values.pop("rope_parameters", None), values.get("rope_scaling") or {}
        if by_kind is not None:
            if not isinstance(by_kind, dict) or not by_kind.keys() <= {config_json.FULL, config_json.SLIDING}:
                raise UserError(f"rope_parameters {json.dumps(by_kind)} is not supported, only one for each layer type")
            near = by_kind.get(config_json.SLIDING) or {}
            if not isinstance(near, dict) or near.get("rope_type", "default") != "default":
                raise UserError(
                    f"rope_parameters {json.dumps(by_kind)} is not supported: sliding layers are not scaled"
                )
            theta = near.get("rope_theta", theta)
            far = by_kind.get(config_json.FULL) or {}
            scaling = {**far, **scaling} if isinstance(far, dict) and isinstance(scaling, dict) else far
        kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
        if scaling and kind not in (("default", "linear") if "type" in scaling else (None, "default", "linear")):
            raise UserError(f"rope scaling {json.dumps(scaling)} is not supported in {values['model_type']} models")
        values["rope_scaling"] = scaling
        found = super().settings_of(values)
        return found | ({"sliding_rope_theta": theta} if "sliding_window" in found else {})

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        near = config.rope_theta if config.sliding_rope_theta is None else config.sliding_rope_theta
        return super().to_hf(config) | {_NEAR: near}


FAMILY = _Gemma3(
    "Gemma3ForCausalLM",
    qk_norm="head",
    settings=(
        *("rope_scaling", "sliding_window", "sliding_layers", "sliding_rope_theta"),
        *("attention_scale", "logit_softcap"),
    ),
    named={"logit_softcap": "final_logit_softcapping"},
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        _NEAR: 10000.0,
        PATTERN: 6,
    },
    keys={"attention_bias": False},
)
