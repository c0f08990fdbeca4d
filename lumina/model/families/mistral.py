"""Mistral 7B: Llama with a sliding window in every layer.

Reference: arXiv:2310.06825.
"""

from __future__ import annotations

from typing import Any

from lumina.model.families import Family


class _Mistral(Family):
    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        """Its window is that of every layer: the keys by which others choose layers mean nothing here."""
        values.pop("use_sliding_window", None)
        return {}


# A file that does not mention a window has one of 4096 tokens.
FAMILY = _Mistral(
    "MistralForCausalLM",
    settings=("rope_scaling", "sliding_window"),
    named={"sliding_window": "sliding_window"},
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
)
