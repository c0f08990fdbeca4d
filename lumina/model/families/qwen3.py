"""Qwen3: a norm over each head's queries and keys, and heads that need not fill the hidden width.

Reference: arXiv:2505.09388.
"""

from __future__ import annotations

from lumina.model.families import Family

FAMILY = Family(
    "Qwen3ForCausalLM",
    qk_norm=True,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    keys={"use_sliding_window": False, "attention_bias": False},
)
