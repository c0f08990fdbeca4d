"""Seed-OSS: Llama with biases of queries, keys and values, and heads that need not fill the hidden width.

A family is what differs from Llama: here the biases, what transformers takes for keys that config.json leaves out, and
what config.json says beside the common part. It is named after transformers' `model_type`.
"""

from typing import Any

from lumina.config import ModelConfig, UserError
from lumina.model.families import Family


class SeedOss(Family):
    def from_hf(self, values: dict[str, Any]) -> ModelConfig:
        if values.get("attention_out_bias") or not values.get("attention_bias", True):
            raise UserError("a Seed-OSS model with other biases than those of queries, keys and values")
        return super().from_hf({**values, "attention_bias": False})  # else read as Llama's, on the output too


FAMILY = SeedOss(
    "SeedOssForCausalLM",
    qkv_bias=True,
    defaults={"max_position_embeddings": 524288, "head_dim": 128},
    keys={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "residual_dropout": 0.0},
)
