"""Qwen3's mixtures of experts: Qwen3 whose feed-forward layers, or some of them, have experts of their own width.

Reference: arXiv:2505.09388.
"""

from __future__ import annotations

from typing import Any

from lumina.config import ModelConfig
from lumina.model.families._experts import ExpertFamily


class _Qwen3Moe(ExpertFamily):
    def from_hf(self, values: dict[str, Any]) -> ModelConfig:
        """Its window, if it has one, is that of every layer."""
        kept = {name: value for name, value in values.items() if name not in ("max_window_layers", "layer_types")}
        return super().from_hf(kept)


FAMILY = _Qwen3Moe(
    "Qwen3MoeForCausalLM",
    qk_norm=True,
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
    keys={"use_sliding_window": False, "attention_bias": False},
)
