"""Mistral without a sliding window: Llama under another name.

Reference: arXiv:2310.06825.
"""

from __future__ import annotations

from lumina.model.families import Family

# A file that does not mention a window has one of 4096 tokens, and uses it.
FAMILY = Family(
    "MistralForCausalLM",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "use_sliding_window": True,
    },
    keys={"sliding_window": None},
)
