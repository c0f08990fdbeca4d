"""Settings that make a rank's activations fewer: the one list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lumina.config.schema import Config


@dataclass(frozen=True)
class MemorySetting:
    """flag: as people are told of it; saving: how much the setting saves, to be compared with another value's of the
    same setting: 0 where it is off, and more where it saves more; possible: whether the model can be trained so."""

    name: str
    flag: str
    saving: Callable[[Config], float]
    possible: Callable[[Config], bool] = lambda config: True


MEMORY_SETTINGS = (
    MemorySetting(
        "gradient_checkpointing",
        "--gradient-checkpointing",
        lambda config: 1 / config.checkpoint_every if config.checkpoint_every else 0.0,
    ),
    MemorySetting(
        "activation_offloading", "--activation-offloading", lambda config: float(config.activation_offloading)
    ),
    MemorySetting(
        "mlp_tile_tokens",
        "--mlp-tile-tokens 4096",
        lambda config: 1 / config.mlp_tile_tokens if config.mlp_tile_tokens else 0.0,
        lambda config: not config.untiled,
    ),
    MemorySetting(
        "attention_head_groups",
        "--attention-head-groups 2",
        lambda config: config.attention_head_groups - 1.0,
        lambda config: (
            config.saves_by_head_groups(config.precision)
            and 2 in config.fitting_head_groups(config.sequence_parallel_size)
        ),
    ),
)
