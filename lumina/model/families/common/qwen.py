"""Sliding windows as Qwen's config.json says them: in the layers from max_window_layers on, or those of layer_types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lumina.config import ModelConfig
from lumina.model.families.common import config_json
from lumina.model.families.common.family import Family


@dataclass(frozen=True)
class Qwen(Family):
    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        first = values.pop("max_window_layers")
        if not values.pop("use_sliding_window", False):
            values["sliding_window"] = None  # files may name one that the model does not use
        slides = values["sliding_window"] is not None
        layers = range(config_json.count_of_layers(values))
        return config_json.windows(
            values, ["sliding_attention" if slides and i >= first else "full_attention" for i in layers]
        )

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        written = super().to_hf(config) | {"use_sliding_window": config.sliding_window is not None}
        if config.sliding_window is not None:
            kinds = config_json.layer_types(config)
            first = kinds.index(config_json.SLIDING)
            written |= {"sliding_window": config.sliding_window, "max_window_layers": first, "layer_types": kinds}
        return written
