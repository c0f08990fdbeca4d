"""Configuration: what a run is. Schema, presets, the merge of preset < YAML < flags < --set, and the DeepSpeed JSON.

Nothing here imports torch, so that commands which only read or print a configuration answer at once.
"""

from lumina.config.errors import UserError, did_you_mean
from lumina.config.load import load, preset_names
from lumina.config.schema import (
    MIN_VOCAB,
    PROJECTIONS,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RopeScaling,
    RunConfig,
)

__all__ = [
    "MIN_VOCAB",
    "PROJECTIONS",
    "Config",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeScaling",
    "RunConfig",
    "UserError",
    "did_you_mean",
    "load",
    "preset_names",
]
