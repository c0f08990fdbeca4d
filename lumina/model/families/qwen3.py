"""Qwen3: a norm over each head's queries and keys, and heads that need not fill the hidden width.

Reference: arXiv:2505.09388.
"""

from __future__ import annotations

from lumina.model.families.common.qwen import Qwen

FAMILY = Qwen(
    "Qwen3ForCausalLM",
    qk_norm="head",
    settings=("rope_scaling", "sliding_window", "sliding_layers"),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    keys={"attention_bias": False},
)
