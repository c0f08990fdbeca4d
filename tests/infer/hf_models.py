"""Hugging Face folders of small random models, made by transformers: one of every kind that Lumina takes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.small_tokenizer import VOCABULARY, write_tokenizer

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "dtype": torch.float16},
    "llama2-long": {"num_key_value_heads": 4, "rope": LINEAR, "dtype": torch.float16},
    "llama3": {"num_key_value_heads": 2, "rope_theta": 500000.0, "dtype": torch.bfloat16},
    "llama3.2": {
        "num_key_value_heads": 2,
        "rope": LLAMA_3_SCALING,
        "rope_theta": 5000.0,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "dtype": torch.bfloat16,
    },
    "tinyllama": {"num_key_value_heads": 1, "dtype": torch.float32},
    "smollm2": {"num_key_value_heads": 2, "rope_theta": 100000.0, "tie_word_embeddings": True, "dtype": torch.bfloat16},
    "mistral": {"num_key_value_heads": 2, "dtype": torch.bfloat16},
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 1e6, "dtype": torch.bfloat16},
    "qwen2-tied": {"num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": True, "dtype": torch.bfloat16},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 20, "rope_theta": 1e6, "dtype": torch.bfloat16},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 9,
        "sliding_window": 7,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "dtype": torch.bfloat16,
    },
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 900.0},
        },
        "dtype": torch.bfloat16,
    },
    "phi3": {
        "num_key_value_heads": 2,
        "sliding_window": 7,
        "rope": {"partial_rotary_factor": 0.5},
        "pad_token_id": 0,
        "dtype": torch.bfloat16,
    },
    "olmo2": {"num_key_value_heads": 2, "dtype": torch.bfloat16},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "pad_token_id": 0, "dtype": torch.bfloat16},
    "granite": {
        "num_key_value_heads": 2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
        "dtype": torch.bfloat16,
    },
    "mistral-window": {"num_key_value_heads": 2, "sliding_window": 7, "dtype": torch.bfloat16},
    "qwen2-window": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "dtype": torch.bfloat16,
    },
    "llama-yarn": {
        "num_key_value_heads": 2,
        "rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 4.0},
        "dtype": torch.bfloat16,
    },
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "rope_theta": 1e6, "dtype": torch.bfloat16},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 20,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "dtype": torch.bfloat16,
    },
    "olmoe": {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3, "dtype": torch.bfloat16},
    "qwen3-tied": {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True, "dtype": torch.float32},
}

CLASSES = {
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "granite": "Granite",
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmo2": "Olmo2",
    "olmoe": "Olmoe",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3_moe": "Qwen3Moe",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}


def model_type(family: str) -> str:
    return next((kind for kind in CLASSES if family.startswith(kind)), "llama")


def make_hf(folder: Path, family: str) -> None:
    """Write transformers' own folder of a small random model of a kind, with a small tokenizer."""
    import transformers

    options = dict(FAMILIES[family])
    dtype, theta = options.pop("dtype"), options.pop("rope_theta", 10000.0)
    rope = options.pop("rope", {})
    if "full_attention" not in rope:
        rope = {"rope_type": "default", **rope, "rope_theta": theta}
    options |= {"rope_parameters": rope, "eos_token_id": 2, "bos_token_id": 0, **SIZES}
    if family == "mistral":
        options["sliding_window"] = None
    name = CLASSES[model_type(family)]
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    options = {"tie_word_embeddings": False} | options
    config = getattr(transformers, kind)(
        vocab_size=VOCABULARY, max_position_embeddings=96, initializer_range=0.3, **options
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms are made of ones and biases of zeros, which would hide a mistake
            torch.nn.init.uniform_(parameter, 0.3, 1.7)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB" if family == "llama3" else "5GB")
    for file in write_tokenizer(folder / "tokenizer").iterdir():
        file.replace(folder / file.name)
    (folder / "tokenizer").rmdir()
