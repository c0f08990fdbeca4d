"""OLMoE: many small experts, and norms over the queries of all heads together and over the keys.

Reference: arXiv:2409.02060.
"""

from __future__ import annotations

from typing import Any

from lumina.config import ModelConfig
from lumina.model.families.common.experts import ExpertFamily


class _Olmoe(ExpertFamily):
    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """OLMoE has no key head_dim: its heads fill the hidden width."""
        written = super().to_hf(config)
        del written["head_dim"]
        return written

    def experts_fault(self, config: ModelConfig) -> str | None:
        if config.head_size is not None:
            return f"head_size (head_dim) is hidden_size / num_heads (num_attention_heads) in family {config.family}"
        return super().experts_fault(config)


FAMILY = _Olmoe(
    "OlmoeForCausalLM",
    qk_norm="width",
    loss_weight=0.01,
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    expert_defaults={"num_experts": 64, "num_experts_per_tok": 8},
    keys={"attention_bias": False, "clip_qkv": None},
)
