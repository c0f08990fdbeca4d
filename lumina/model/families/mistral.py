"""Mistral in contexts of at most its sliding window: Llama under another name.

Reference: arXiv:2310.06825.
"""

from __future__ import annotations

from typing import Any

from lumina.config import ModelConfig
from lumina.model.families import Family


class _Mistral(Family):
    def from_hf(self, values: dict[str, Any]) -> ModelConfig:
        """Its window is that of every layer: the keys by which others choose layers mean nothing here."""
        ignored = ("max_window_layers", *(["layer_types"] if not _slides(values.get("layer_types")) else []))
        kept = {name: value for name, value in values.items() if name not in ignored}
        return super().from_hf(kept | {"use_sliding_window": True})


def _slides(layers: Any) -> bool:
    return layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers))


# A file that does not mention a window has one of 4096 tokens.
FAMILY = _Mistral(
    "MistralForCausalLM",
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    keys={"sliding_window": None},
)
