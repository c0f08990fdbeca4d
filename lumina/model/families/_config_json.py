"""config.json of transformers' Llama and its like, both ways; what this model cannot represent exactly is refused."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from lumina.config import ModelConfig, RopeScaling, UserError

# What other families' files say of their computation. None of ours reads them: a file that has one was not written for
# the decoder that its model_type names.
_FOREIGN = (
    *("attention_multiplier", "attn_logit_softcapping", "clip_qkv", "embedding_multiplier", "final_logit_softcapping"),
    *("logit_scale", "logits_scaling", "no_rope_layers", "num_experts", "num_local_experts", "parallel_attn"),
    *("qk_layernorm", "query_pre_attn_scalar", "residual_multiplier", "rotary_pct", "use_qk_norm"),
)
MOST_LAYERS = 2**16
_WIDEST = 2**24  # no width is beyond this but in a damaged file


def read(values: dict[str, Any], **settings: Any) -> ModelConfig:
    """Our configuration of a config.json with its family's defaults filled in; `settings`: ours, of what only some
    families have. Raises UserError, naming what this model cannot represent."""
    family = values["model_type"]
    _refuse_unsupported(values)
    theta, scaling = _rope(values)
    hidden, heads, head = (values.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    kv_heads = values.get("num_key_value_heads")
    usual = isinstance(heads, int) and isinstance(head, int) and head * heads == hidden
    ours = {
        "hidden_size": hidden,
        "num_layers": values.get("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "seq_length": values["max_position_embeddings"],
        "vocab_size": values.get("vocab_size"),
        "intermediate_size": values.get("intermediate_size"),
        "family": family,
        "head_size": None if usual else head,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "init_std": values.get("initializer_range", 0.02),
        **settings,
    }
    try:
        config = ModelConfig.model_validate(ours)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise UserError(f"config.json does not describe a {family} model: {where}: {first['msg']}") from None
    widths = {name: getattr(config, name) for name in ("hidden_size", "ffn_size", "vocab_size", "expert_size")}
    widths["experts"] = 0 if config.experts is None else config.experts.count
    for name, width in (widths | {"num_attention_heads * head_dim": config.num_heads * config.head_dim}).items():
        if width > _WIDEST:
            raise UserError(f"config.json does not describe a {family} model: {name} is {width}")
    return config


def _refuse_unsupported(values: dict[str, Any]) -> None:
    refused = {
        "attention_bias": values.get("attention_bias"),
        "mlp_bias": values.get("mlp_bias"),
        "a quantised checkpoint (quantization_config)": values.get("quantization_config"),
    }
    # None, false and a factor of 1 change nothing.
    refused |= {name: value for name in _FOREIGN if (value := values.get(name)) != 1}
    for what, value in refused.items():
        if value:
            raise UserError(f"{what} is not supported ({json.dumps(value)})")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):  # transformers has both names
        raise UserError(f"hidden_act {values['hidden_act']} is not supported, only silu")
    if values.get("pretraining_tp", 1) not in (1, None):
        raise UserError(f"pretraining_tp {values['pretraining_tp']} is not supported, only 1")
    _refuse_windows(values)


def _refuse_windows(values: dict[str, Any]) -> None:
    """A token of a sliding window of W attends to itself and the W - 1 before it: in a context of at most W tokens that
    is all of them, and the window makes no difference. Raises UserError where it would."""
    # Files may name a window that the model does not use.
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    layers, context = values.get("layer_types"), values["max_position_embeddings"]
    if layers is None:
        count, first = values.get("num_hidden_layers"), values.get("max_window_layers") or 0
        slides = window is not None and not (isinstance(count, int) and isinstance(first, int) and first >= count)
    else:
        known = {"full_attention", "sliding_attention"}
        slides = isinstance(layers, list) and "sliding_attention" in layers
        if not isinstance(layers, list) or not all(isinstance(kind, str) and kind in known for kind in layers):
            raise UserError(f"layer_types {json.dumps(layers)} is not supported, only full and sliding attention")
        if slides and window is None:
            raise UserError(f"layer_types has sliding_attention without a sliding_window ({json.dumps(layers)})")
    if not slides or (type(window) is int and type(context) is int and window >= context):
        return
    raise UserError(
        f"sliding_window {json.dumps(window)} is not supported below the context length {json.dumps(context)}",
        f"In a context of at most {json.dumps(window)} tokens it makes no difference: --context-length does that.",
    )


def _rope(values: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Rope theta and scaling of the old form (rope_theta, rope_scaling) or the new (rope_parameters). As in
    transformers, the old one goes first, whole, and what a scaling does not say stands beside it."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for name, given in (("rope_parameters", new), ("rope_scaling", old)):
        if given is not None and not isinstance(given, dict):
            raise UserError(f"{name} {json.dumps(given)} is not supported")
    scaling = old or new or {}
    theta = scaling.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    nested = any(isinstance(value, dict) for value in scaling.values())
    if kind not in ("default", "linear", "llama3") or nested:
        raise UserError(
            f"rope scaling {json.dumps(scaling)} is not supported", "Supported: linear, llama3, and none at all."
        )
    if partial not in (None, 1):
        raise UserError(f"rope scaling with partial_rotary_factor {json.dumps(partial)} is not supported")
    if kind == "default":
        return theta, None
    ours = {"type": kind, "factor": scaling.get("factor")}
    if kind == "llama3":
        ours |= {
            "low_freq_factor": scaling.get("low_freq_factor"),
            "high_freq_factor": scaling.get("high_freq_factor"),
            "original_max_position_embeddings": scaling.get(
                "original_max_position_embeddings",
                values.get("original_max_position_embeddings", values["max_position_embeddings"]),
            ),
        }
    return theta, ours


def write(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the model in every family."""
    return {
        "model_type": config.family,
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
        "rope_scaling": None if config.rope_scaling is None else _scaling_out(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }


def _scaling_out(scaling: RopeScaling) -> dict[str, Any]:
    theirs: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        theirs |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return theirs
