"""Qwen2 and Qwen2.5: biases of queries, keys and values.

Reference: arXiv:2407.10671.
"""

from __future__ import annotations

from typing import Any

from lumina.config import ModelConfig
from lumina.model.families.common.qwen import Qwen


class _Qwen2(Qwen):
    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Qwen2 has the key head_dim only where the heads do not fill the hidden width."""
        written = super().to_hf(config)
        if config.head_size is None:
            del written["head_dim"]
        return written


FAMILY = _Qwen2(
    "Qwen2ForCausalLM",
    qkv_bias=True,
    settings=("rope_scaling", "sliding_window", "sliding_layers"),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
