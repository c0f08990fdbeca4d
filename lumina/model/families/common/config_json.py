"""config.json of transformers' Llama and its like, both ways; what this model cannot represent exactly is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
_WIDEST = 2**24  # no width is beyond this but in a damaged file
MOST_LAYERS = 2**16
FULL, SLIDING = "full_attention", "sliding_attention"

# What a rope scaling says beside its type.
_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    ),
}


def read(values: dict[str, Any], own: Mapping[str, Any], named: Mapping[str, str]) -> ModelConfig:
    """Our configuration of a config.json with its family's defaults filled in. `own`: settings that were read already,
    and their keys taken out; `named`: the keys of some. Raises UserError, naming what this model cannot represent."""
    family = values["model_type"]
    _refuse_unsupported(values)
    theta, scaling, partial = _rope(values)
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
        "partial_rotary_factor": 1.0 if partial is None else partial,
        "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "init_std": values.get("initializer_range", 0.02),
        **own,
    }
    try:
        config = ModelConfig.model_validate(ours)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"])) or "config"
        where = f"{named[setting]} ({setting})" if setting in named else setting
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
    window, slide = values.get("sliding_window"), values.get("use_sliding_window")
    if slide and window is not None:
        raise UserError(f"sliding_window {json.dumps(window)} is not supported in {values['model_type']} models")
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != FULL for kind in kinds)):
        raise UserError(f"layer_types {json.dumps(kinds)} is not supported in {values['model_type']} models")


def windows(values: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Window and its layers of families that have both: of layer_types, else `kinds`. Takes the keys out of `values`.
    Raises UserError where a layer slides without a window."""
    given, window = values.pop("layer_types", None), values.pop("sliding_window", None)
    kinds = kinds if given is None else given
    if not isinstance(kinds, list) or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise UserError(f"layer_types {json.dumps(kinds)} is not supported, only full and sliding attention")
    if len(kinds) != values.get("num_hidden_layers"):
        raise UserError(f"layer_types {json.dumps(kinds)} is not of num_hidden_layers layers")
    sliding = [layer for layer, kind in enumerate(kinds) if kind == SLIDING]
    if sliding and window is None:
        raise UserError(f"layer_types has sliding_attention without a sliding_window ({json.dumps(kinds)})")
    if not sliding:
        return {}
    return {"sliding_window": window, "sliding_layers": None if len(sliding) == len(kinds) else sliding}


def layer_types(config: ModelConfig) -> list[str]:
    """transformers' key of that name."""
    layers = range(config.num_layers) if config.sliding_layers is None else config.sliding_layers
    sliding = set() if config.sliding_window is None else set(layers)
    return [SLIDING if layer in sliding else FULL for layer in range(config.num_layers)]


def count_of_layers(values: dict[str, Any]) -> int:
    """num_hidden_layers, 0 where it is none (which is refused elsewhere)."""
    count = values.get("num_hidden_layers")
    return count if type(count) is int and 0 < count <= MOST_LAYERS else 0


def _rope(values: dict[str, Any]) -> tuple[Any, dict[str, Any] | None, Any]:
    """Rope theta, scaling and rotated share of the old form (rope_theta, rope_scaling) or the new (rope_parameters). As
    in transformers, the old one goes first, whole, and what a scaling does not say stands beside it."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for name, given in (("rope_parameters", new), ("rope_scaling", old)):
        if given is not None and not isinstance(given, dict):
            raise UserError(f"{name} {json.dumps(given)} is not supported")
    scaling = old or new or {}
    theta = scaling.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    nested = any(isinstance(value, dict) for value in scaling.values())
    if kind not in ("default", *_SCALINGS) or nested:
        known = ", ".join(_SCALINGS)
        raise UserError(f"rope scaling {json.dumps(scaling)} is not supported", f"Supported: {known}, and none at all.")
    if kind == "default":
        return theta, None, partial
    found = {"type": kind} | {name: scaling[name] for name in _SCALINGS[kind] if scaling.get(name) is not None}
    if "original_max_position_embeddings" in _SCALINGS[kind]:
        longest = values.get("original_max_position_embeddings", values["max_position_embeddings"])
        found.setdefault("original_max_position_embeddings", longest)
    if kind == "yarn":
        _complete_yarn(found, scaling, values)
    return theta, found, partial


def _complete_yarn(found: dict[str, Any], scaling: dict[str, Any], values: dict[str, Any]) -> None:
    """The factors that YaRN files may leave to be computed: of the frequencies, and of cosines and sines by DeepSeek's
    two weights of the logarithm (arXiv:2405.04434)."""
    lengths = values["max_position_embeddings"], found["original_max_position_embeddings"]
    if "factor" not in found and all(type(length) is int and length > 0 for length in lengths):
        found["factor"] = lengths[0] / lengths[1]
    weights = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if "attention_factor" not in found and all(weights) and isinstance(found.get("factor"), int | float):
        try:
            over, under = (0.1 * float(w) * math.log(found["factor"]) + 1.0 for w in weights)  # type: ignore[arg-type]
            found["attention_factor"] = over / under
        except (TypeError, ValueError, ZeroDivisionError):
            raise UserError(f"rope scaling {json.dumps(scaling)} is not supported: mscale") from None


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
    said = {name: getattr(scaling, name) for name in _SCALINGS[scaling.type]}
    return {"rope_type": scaling.type} | {name: value for name, value in said.items() if value is not None}
