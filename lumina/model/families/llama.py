"""Llama 2 and 3 with linear or llama3 rope scaling, TinyLlama, SmolLM2.

Reference: arXiv:2307.09288, arXiv:2407.21783.
"""

from __future__ import annotations

from lumina.model.families import Family

FAMILY = Family(
    "LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    keys={"attention_bias": False, "mlp_bias": False},
)
