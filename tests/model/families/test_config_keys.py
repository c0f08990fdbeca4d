"""Every key of a config.json that transformers' own families know: it changes our logits as it changes theirs, or the
import refuses it by name. None is ignored in silence."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumina.config import FAMILIES, UserError
from lumina.model import Transformer
from lumina.model.families import family_of, read_hf_config
from tests.infer.hf_models import CLASSES

CONTEXT = 24
BASE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": CONTEXT,
    "sliding_window": None,
    "initializer_range": 0.4,
    "rope_theta": 30.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
# Where a family's own file would not do without.
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# What each key is tried with. A key of transformers' that stands neither here nor in OTHER fails the last test.
TRIED: dict[str, list[Any]] = {
    "vocab_size": [33],
    "hidden_size": [32, 20],
    "intermediate_size": [8],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [1, 4, None],
    "head_dim": [2, 8, None],
    "hidden_act": ["silu", "swish", "gelu", "relu"],
    "max_position_embeddings": [16, 96],
    "initializer_range": [0.1],
    "rms_norm_eps": [0.5],
    "tie_word_embeddings": [True, False],
    "pretraining_tp": [2, 1, None],
    "rope_theta": [3.0, 1000],
    "partial_rotary_factor": [0.5, 1.0, None],
    "original_max_position_embeddings": [12, 48],
    "rope_scaling": [
        None,
        {},
        {"type": "linear", "factor": 3.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0},
        LLAMA3,
        LLAMA3 | {"original_max_position_embeddings": 8},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        YARN | {"beta_fast": 2.0, "beta_slow": 0.5, "rope_theta": 100.0},
        YARN | {"truncate": False, "attention_factor": 0.7, "beta_fast": 3},
        YARN | {"mscale": 0.8, "mscale_all_dim": 0.3, "beta_slow": 0.1},
        {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    ],
    "rope_parameters": [
        None,
        {"rope_type": "default", "rope_theta": 4.0},
        {"rope_type": "linear", "factor": 2.0},
        LLAMA3 | {"rope_theta": 7.0, "original_max_position_embeddings": 8},
        {"rope_type": "default", "rope_theta": 4.0, "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_theta": 7.0}},
        {"full_attention": {"rope_theta": 3.0}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}},
    ],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "sliding_window": [4, CONTEXT - 1, CONTEXT, 96, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 2, 28],
    "attn_logit_softcapping": [2.0, None],
    "final_logit_softcapping": [3.0, None],
    "query_pre_attn_scalar": [1, 9],
    "hidden_activation": ["gelu_pytorch_tanh", "gelu", "silu"],
    "use_bidirectional_attention": [True, False],
    "sliding_window_pattern": [1, 2, 3],
    "rope_local_base_freq": [5.0],
    "embedding_multiplier": [3.0],
    "residual_multiplier": [0.3],
    "attention_multiplier": [0.3, 2],
    "logits_scaling": [4.0, 7],
    "no_rope_layers": [[1, 0], [0, 0, 0], None, [1]],
    "no_rope_layer_interval": [1, 2, 3],
    "num_experts": [6],
    "num_experts_per_tok": [1, 3],
    "moe_intermediate_size": [16],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[0], [1], [], None],
    "clip_qkv": [0.1, None],
    # Other families' keys, which transformers' classes of these do not read.
    "logit_scale": [0.5, 1.0],
    "qk_layernorm": [True],
    "num_local_experts": [8],
    "layer_types": [
        None,
        ["full_attention", "full_attention"],
        ["full_attention", "sliding_attention"],
        ["sliding_attention", "sliding_attention"],
    ],
}
# They do not reach the logits: files' descriptions, outputs that are returned, training's dropout, tokens' numbers.
OTHER = {
    *("transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "torch_dtype"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "_name_or_path", "model_type"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    *("output_attentions", "resid_pdrop", "embd_pdrop", "_sliding_window_pattern"),
}


def base_of(family: str) -> dict[str, Any]:
    return BASE | OWN.get(family, {}) | {"model_type": family}


@cache
def _classes(family: str) -> tuple[Any, Any]:
    import transformers

    name = CLASSES[family]
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    return getattr(transformers, config), getattr(transformers, f"{name}ForCausalLM")


def _theirs(family: str, values: dict[str, Any]) -> Any | None:
    """transformers' model of a config.json, its norms and biases away from ones and zeros; None where it has none."""
    config_class, model_class = _classes(family)
    torch.manual_seed(0)
    try:
        model = model_class(config_class.from_dict(json.loads(json.dumps(values)))).eval()
        model(torch.arange(4)[None])
    except Exception:  # a combination that transformers itself does not take
        return None
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.3, 1.7)
    return model


def _differs(family: str, values: dict[str, Any]) -> str | None:
    """None where our model of a config.json gives transformers' logits; else what was refused. Fails on another."""
    theirs = _theirs(family, values)
    try:
        config = read_hf_config(values)
    except UserError as error:
        return str(error)
    if theirs is None:
        return None
    ours = Transformer(config).eval()
    stored = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # transformers stacks experts' matrices in memory, as we do.
            layouts = family_of(config).layouts(name, config)
            layout = next(parts for parts in layouts if all(t.name in stored for t in parts))
            parameter.copy_(torch.cat([stored.pop(t.name) for t in layout]))
    assert not stored.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set()), "a tensor has no place"
    length = min(CONTEXT, config.seq_length)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids, torch.arange(length)[None]), expected, rtol=1e-4, atol=1e-4)
    return None


def test_every_family_is_held_against_transformers() -> None:
    assert CLASSES.keys() == set(FAMILIES.own())


@pytest.mark.parametrize("family", CLASSES)
def test_each_key_is_used_or_refused_by_name(family: str) -> None:
    base = base_of(family)
    assert _differs(family, base) is None
    used = 0
    for key, tried in TRIED.items():
        for value in tried:
            refused = _differs(family, base | {key: value})
            used += refused is None
            names = (key, *(("rope scaling", "rope_scaling", "partial_rotary") if key.startswith("rope_") else ()))
            assert refused is None or any(name in refused for name in names), (key, value, refused)
    assert used > 30  # most are used, not refused


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(CLASSES)),
    st.dictionaries(st.sampled_from(sorted(TRIED)), st.integers(0, 7), max_size=5),
    st.sets(st.sampled_from(["head_dim", "rope_theta", "num_key_value_heads", "sliding_window"])),
)
def test_keys_together_and_keys_left_out(family: str, changed: dict[str, int], left_out: set[str]) -> None:
    values = {key: value for key, value in base_of(family).items() if key not in left_out}
    _differs(family, values | {key: TRIED[key][number % len(TRIED[key])] for key, number in changed.items()})


@pytest.mark.parametrize("family", CLASSES)
def test_no_key_of_transformers_is_missing_here(family: str) -> None:
    known = _classes(family)[0]().to_dict()
    assert not known.keys() - TRIED.keys() - OTHER
    for key in OTHER & known.keys():  # the others are of no account to the shape that is read
        assert read_hf_config(base_of(family)) == read_hf_config(base_of(family) | {key: known[key]})
