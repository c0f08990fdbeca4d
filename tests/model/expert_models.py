"""transformers' mixtures of experts, a few thousand weights each, and ours with the same weights."""

from __future__ import annotations

import json
from typing import Any

import torch

from lumina.model import Transformer
from lumina.model.families import family_of, read_hf_config

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
    "pad_token_id": None,  # transformers leaves the embedding of padding as it is
    "sliding_window": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "head_dim": 12}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 8, "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3_moe-sums": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 24, "decoder_sparse_step": 2}),
    "olmoe": ("Olmoe", {"num_experts": 8}),
}


def make_pair(name: str, seed: int = 0, **changes: Any) -> tuple[Transformer, Any]:
    """Our model and transformers', float32, with one set of weights; norms are not all one."""
    import transformers

    kind, values = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | values | changes))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ours = Transformer(read_hf_config(json.loads(config.to_json_string())))
    stored = theirs.state_dict()
    with torch.no_grad():
        for parameter, pieces in zip(ours.parameters(), their_weights(ours, stored), strict=True):
            parameter.copy_(pieces.view_as(parameter))
    return ours, theirs


def their_weights(ours: Transformer, stored: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """transformers' weights in the order of our parameters, each with our rows; fails where one is left over."""
    left, found = dict(stored), []
    if ours.config.tie_word_embeddings:
        del left["lm_head.weight"]
    for name, _ in ours.named_parameters():
        layouts = family_of(ours.config).layouts(name, ours.config)
        parts = next(parts for parts in layouts if all(part.name in left for part in parts))
        found.append(torch.cat([left.pop(part.name) for part in parts]))
    assert not left
    return found
