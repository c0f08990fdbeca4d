"""Mixtral: Mistral whose feed-forward layers are mixtures of experts.

Reference: arXiv:2401.04088.
"""

from __future__ import annotations

from typing import Any

from lumina.config import ModelConfig
from lumina.model.families._experts import ExpertFamily


class _Mixtral(ExpertFamily):
    def from_hf(self, values: dict[str, Any]) -> ModelConfig:
        """Its window is that of every layer: the keys by which others choose layers mean nothing here."""
        kept = {name: value for name, value in values.items() if name not in ("max_window_layers", "layer_types")}
        return super().from_hf(kept | {"use_sliding_window": True})


FAMILY = _Mixtral(
    "MixtralForCausalLM",
    module="block_sparse_moe",
    gate_up=("w1", "w3"),
    down="w2",
    count="num_local_experts",
    normalises=True,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    expert_defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
    keys={"sliding_window": None},
)
