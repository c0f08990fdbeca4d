"""Our weights and configuration under the names that transformers uses for Llama, Mistral, Qwen2 and Qwen3.

Two of our matrices are several of theirs laid one on top of the other: qkv = (q, k, v) and gate_up = (gate, up).

Config format: transformers' LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config (config.json). lumina.infer.hf_config
reads what is written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumina.config import ModelConfig, RopeScaling

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
    hidden, head = config.hidden_size, config.head_dim
    if ours in _OUTER:
        return [Part(_OUTER[ours], hidden if ours == "norm.weight" else config.vocab_size)]
    _, layer, rest = ours.split(".", 2)
    place, kind = rest.rsplit(".", 1)
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    inner = {
        "attention.qkv": (("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)),
        "attention.q_norm": (("self_attn.q_norm", head),),
        "attention.k_norm": (("self_attn.k_norm", head),),
        "attention.out": (("self_attn.o_proj", hidden),),
        "feed_forward.gate_up": (("mlp.gate_proj", config.ffn_size), ("mlp.up_proj", config.ffn_size)),
        "feed_forward.down": (("mlp.down_proj", hidden),),
        "attention_norm": (("input_layernorm", hidden),),
        "feed_forward_norm": (("post_attention_layernorm", hidden),),
    }
    return [Part(f"model.layers.{layer}.{name}.{kind}", rows) for name, rows in inner[place]]


def split(ours: str, weight: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """One of our parameters as (name, tensor) pairs of theirs; the tensors are views."""
    pieces = parts(ours, config)
    yield from zip((p.name for p in pieces), torch.split(weight, [p.rows for p in pieces]), strict=True)


# --- config.json ----------------------------------------------------------------------------------

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What each family says beside the common part; all of it means "as this model does it".
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "attention_bias": False},
}


def to_hf_config(config: ModelConfig, dtype: str, stop_id: int | list[int], pad_id: int | None) -> dict[str, Any]:
    """config.json, as every release of transformers that knows the family reads it."""
    # Qwen2 has the key only where the heads do not fill the hidden width.
    head = {} if config.family == "qwen2" and config.head_size is None else {"head_dim": config.head_dim}
    return {
        "architectures": [_CLASSES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        **head,
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _scaling_out(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        **_OWN[config.family],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": stop_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _scaling_out(scaling: RopeScaling) -> dict[str, Any]:
    theirs: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        theirs |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_window,
        }
    return theirs
