"""Model shape: the settings that a checkpoint's parameters depend on, compared before they are loaded; and what the
model computed otherwise when an earlier version trained it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lumina.checkpoint.format import TrainerState
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


def rotary_angles(config: ModelConfig) -> str:
    """The dtype in which the model's rotary angles are computed."""
    return "float64" if any(layer.rope is not None and layer.rope.wide for layer in config.layers) else "float32"


def other_angles(saved: TrainerState, config: ModelConfig) -> str:
    """For people: that a checkpoint was trained with float32's rotary angles, where the model has float64's now, or may
    have been, by a version that recorded neither; empty where that is not so."""
    if not saved.step or saved.rotary_angles == rotary_angles(config) or rotary_angles(config) == "float32":
        return ""
    how = "were trained" if saved.rotary_angles else "may have been trained, by an earlier version,"
    doubt = "" if saved.rotary_angles else "if so, "
    return (
        f"its {saved.step:,} steps, or the first of them, {how} with rotary angles in float32; here they are in "
        "float64, as of every context above 131,072 tokens (docs/long-context.md): "
        f"{doubt}expect a higher loss at first"
    )
