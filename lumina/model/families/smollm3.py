"""SmolLM3: no rotary positions in every fourth layer.

Reference: https://huggingface.co/blog/smollm3; arXiv:2501.18795 for such layers.
"""

from __future__ import annotations

import json
from typing import Any

from lumina.config import ModelConfig, UserError
from lumina.model.families import Family
from lumina.model.families.common import config_json


class _SmolLM3(Family):
    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        rotated, period = values.pop("no_rope_layers", None), values.pop("no_rope_layer_interval")
        count = config_json.count_of_layers(values)
        if rotated is None:
            if type(period) is not int or period <= 0:
                raise UserError(f"no_rope_layer_interval {json.dumps(period)} is not a whole number above 0")
            rotated = [int((layer + 1) % period != 0) for layer in range(count)]
        if not isinstance(rotated, list) or len(rotated) < count or any(one not in (0, 1) for one in rotated):
            raise UserError(f"no_rope_layers {json.dumps(rotated)} is not a list of 1 and 0 for {count} layers")
        nope = [layer for layer, one in enumerate(rotated[:count]) if not one]
        if not values.pop("use_sliding_window", False):
            values["sliding_window"] = None
        slides = values["sliding_window"] is not None
        kinds = [config_json.SLIDING if slides and layer in nope else config_json.FULL for layer in range(count)]
        return {"nope_layers": nope or None, **config_json.windows(values, kinds)}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        nope = config.nope_layers or []
        return super().to_hf(config) | {
            "no_rope_layers": [int(layer not in nope) for layer in range(config.num_layers)],
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "layer_types": config_json.layer_types(config),
        }


FAMILY = _SmolLM3(
    "SmolLM3ForCausalLM",
    settings=("rope_scaling", "nope_layers", "sliding_window", "sliding_layers"),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "sliding_window": None,
    },
    keys={"attention_bias": False, "mlp_bias": False},
)
