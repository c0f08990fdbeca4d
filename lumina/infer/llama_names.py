"""Our weights and configuration under the names that transformers' Llama uses, and back.

Two of our matrices are several of theirs laid one on top of the other: qkv = (q, k, v) and gate_up = (gate, up).

Config format: transformers' LlamaConfig (config.json).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumina.config import ModelConfig

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class Part(NamedTuple):
    """One of their tensors: its name, and how many rows of ours it takes."""

    name: str
    rows: int


def parts(ours: str, config: ModelConfig) -> list[Part]:
    """Their tensors that make up one of our parameters, in order of rows."""
    hidden, kv = config.hidden_size, config.num_kv_heads * config.head_dim
    if ours in _OUTER:
        return [Part(_OUTER[ours], hidden if ours == "norm.weight" else config.vocab_size)]
    _, layer, rest = ours.split(".", 2)
    inner = {
        "attention.qkv.weight": (("self_attn.q_proj", hidden), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)),
        "attention.out.weight": (("self_attn.o_proj", hidden),),
        "feed_forward.gate_up.weight": (("mlp.gate_proj", config.ffn_size), ("mlp.up_proj", config.ffn_size)),
        "feed_forward.down.weight": (("mlp.down_proj", hidden),),
        "attention_norm.weight": (("input_layernorm", hidden),),
        "feed_forward_norm.weight": (("post_attention_layernorm", hidden),),
    }
    return [Part(f"model.layers.{layer}.{name}.weight", rows) for name, rows in inner[rest]]


def split(ours: str, weight: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """One of our parameters as (name, tensor) pairs of theirs; the tensors are views."""
    pieces = parts(ours, config)
    yield from zip((p.name for p in pieces), torch.split(weight, [p.rows for p in pieces]), strict=True)


def to_llama_config(config: ModelConfig, dtype: str, stop_id: int | list[int], pad_id: int | None) -> dict[str, Any]:
    """config.json, as every release of transformers with Llama reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": stop_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def config_facts(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """(rope theta, rope scaling or None) of a config.json in the old form (rope_theta, rope_scaling) or the new
    (rope_parameters)."""
    rope = values.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    scaling = values.get("rope_scaling")
    if scaling is None and rope.get("rope_type", "default") != "default":
        scaling = rope
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        scaling = None
    return theta, scaling
