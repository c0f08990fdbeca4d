"""Model shape: the settings that a checkpoint's parameters depend on, compared before they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lumina.config import ModelConfig, UserError

_MODEL_KEYS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "vocab_size",
    "ffn_size",
    "tie_word_embeddings",
)
# Checkpoints from before there were other families do not name these.
_LATER_KEYS = {"family": "llama", "head_size": None, "experts": None}


def model_shape(config: ModelConfig) -> dict[str, Any]:
    """What a checkpoint's parameters depend on."""
    experts = None if config.experts is None else config.experts.model_dump()
    return {key: getattr(config, key) for key in (*_MODEL_KEYS, *_LATER_KEYS)} | {"experts": experts}


def check_same_model(saved: dict[str, Any], own: dict[str, Any], source: Path) -> None:
    saved = _LATER_KEYS | saved
    differing = [f"{key} {saved.get(key)} there, {own[key]} here" for key in own if saved.get(key) != own[key]]
    if differing:
        raise UserError(
            f"{source} is a checkpoint of another shape: {'; '.join(differing)}",
            "Resume with the run's own configuration (its folder has config.yaml).",
        )
