"""Mixtral: Mistral whose feed-forward layers are mixtures of experts.

Reference: arXiv:2401.04088.
"""

from __future__ import annotations

from typing import Any

from lumina.model.families.common.experts import ExpertFamily


class _Mixtral(ExpertFamily):
    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        """Its window is that of every layer: the keys by which others choose layers mean nothing here."""
        for key in ("use_sliding_window", "max_window_layers", "layer_types"):
            values.pop(key, None)
        return super().settings_of(values)


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
        "sliding_window": None,
    },
    expert_defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
    settings=("rope_scaling", "sliding_window"),
    named={"sliding_window": "sliding_window"},
)
