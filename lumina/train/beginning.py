"""Where a run begins: its newest checkpoint, another run's weights, or nothing; and what must be the same to go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lumina.config import Config, UserError
from lumina.train import checkpoint
from lumina.train.engine import Ranks

_MODEL_KEYS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "vocab_size",
    "ffn_size",
    "tie_word_embeddings",
)


def agree(ranks: Ranks, choose: Callable[[], Path | None]) -> Path | None:
    """Rank 0's choice, or the UserError it met, on every rank; collective."""
    found: list[Any] = [None]
    if ranks.main:
        try:
            found = [choose()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    chosen: Path | None = found[0]
    return chosen


def choose(config: Config, folder: Path) -> Path | None:
    """The newest sound checkpoint that --resume means; None to start anew."""
    saved = checkpoint.checkpoints(folder / "checkpoints")
    if config.resume is None:
        if saved:
            raise UserError(
                f"{folder} already holds checkpoints (newest {saved[0].name})",
                "Add --resume auto to go on, or choose another --experiment-name.",
            )
        return None
    choices = saved if config.resume == "auto" else checkpoint.candidates(config.resume)
    sound = checkpoint.newest_sound(choices)
    if choices and sound is None:
        raise UserError(f"no checkpoint under {choices[0].parent} is whole", "See the warnings above for each one.")
    return sound


def weights_of(given: str) -> Path:
    """The newest sound checkpoint that --init-from means."""
    sound = checkpoint.newest_sound(checkpoint.candidates(given))
    if sound is None:
        raise UserError(f"no checkpoint of {given} is whole", "See the warnings above for each one.")
    if (sound.parent.parent / "tokenizer").is_dir():  # as lumina import leaves it
        raise UserError(
            f"{given} was imported with a tokenizer of its own, and training data is prepared only with cl100k_base",
            "Start from a model that was trained, or exported, by Lumina.",
        )
    return sound


def same_batch(config: Config, size: int) -> Config:
    """The global batch of the run's first start holds for its whole life (law 1), whatever the world size is now."""
    wanted = config.global_batch_size
    if wanted is not None and wanted != size:
        raise UserError(
            f"the run was started with global_batch_size {size}, not {wanted}",
            "Drop global_batch_size to go on, or start another run: the order of samples depends on it.",
        )
    return config.replace(global_batch_size=size)


def shape(config: Config) -> dict[str, Any]:
    return {key: getattr(config, key) for key in _MODEL_KEYS}


def same_model(saved: dict[str, Any], own: dict[str, Any], source: Path) -> None:
    differing = [f"{key} {saved.get(key)} there, {own[key]} here" for key in own if saved.get(key) != own[key]]
    if differing:
        raise UserError(
            f"{source} is a checkpoint of another shape: {'; '.join(differing)}",
            "Resume with the run's own configuration (its folder has config.yaml).",
        )
