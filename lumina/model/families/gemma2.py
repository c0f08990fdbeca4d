"""Gemma 2: norms before and after each sublayer, GELU, soft caps of scores and logits, a window in every other layer.

Reference: arXiv:2408.00118.
"""

from __future__ import annotations

from lumina.model.families.common.gemma import Gemma

FAMILY = Gemma(
    "Gemma2ForCausalLM",
    settings=(
        *("rope_scaling", "sliding_window", "sliding_layers"),
        *("attention_scale", "attention_softcap", "logit_softcap"),
    ),
    named={"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
    defaults={
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    keys={"attention_bias": False},
)
