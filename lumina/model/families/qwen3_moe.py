"""Qwen3's mixtures of experts: Qwen3 whose feed-forward layers, or some of them, have experts of their own width.

Reference: arXiv:2505.09388.
"""

from __future__ import annotations

from typing import Any

from lumina.config import ModelConfig
from lumina.model.families.common.experts import ExpertFamily


class _Qwen3Moe(ExpertFamily):
    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        """Its window, if it has one, is that of every layer."""
        for key in ("max_window_layers", "layer_types"):
            values.pop(key, None)
        window, uses = values.pop("sliding_window"), values.pop("use_sliding_window", False)
        return super().settings_of(values) | ({"sliding_window": window} if uses else {})

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        window = config.sliding_window
        return super().to_hf(config) | {"use_sliding_window": window is not None, "sliding_window": window}


FAMILY = _Qwen3Moe(
    "Qwen3MoeForCausalLM",
    qk_norm="head",
    width="moe_intermediate_size",
    mixed=True,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "intermediate_size": 6144,
    },
    expert_defaults={
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
    settings=("rope_scaling", "sliding_window"),
    keys={"attention_bias": False},
)
