"""OLMo 2: norms after each sublayer instead of before, and over all heads' queries and keys together.

Reference: arXiv:2501.00656.
"""

from __future__ import annotations

from lumina.model.families import Family

FAMILY = Family(
    "Olmo2ForCausalLM",
    arrangement="post-norm",
    qk_norm="width",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    keys={"attention_bias": False},
)
