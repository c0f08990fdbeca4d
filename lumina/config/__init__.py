"""Configuration: what a run is. Schema, presets, the merge of preset < YAML < flags < --set, and the DeepSpeed JSON.

Nothing here imports torch, so that commands which only read or print a configuration answer at once; names are loaded
on first use, so that `lumina --help` needs no pydantic. Handed out as modules: `deepspeed` (the DeepSpeed JSON),
`precision`, `private_names` and `versions` (what is relied on of libraries), `registry` and `schema`.
"""

from typing import TYPE_CHECKING

from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.config.errors import UserError, did_you_mean
    from lumina.config.loading import DEFAULT_PRESET, PRESETS, load, parse_settings, preset_names, run_config
    from lumina.config.registry import (
        FAMILIES,
        FORMATS,
        HEALTH_RULES,
        OBJECTIVES,
        SCHEDULES,
        TRACKERS,
        TRANSPORTS,
        Registry,
    )
    from lumina.config.renamed import upgrade
    from lumina.config.rows import CHUNK_BYTES, ROW_TILE, output_chunk_bytes, round_up
    from lumina.config.schema import (
        MIN_VOCAB,
        PROJECTIONS,
        Config,
        DataConfig,
        DataSource,
        HealthConfig,
        LoraConfig,
        ModelConfig,
        MonitorConfig,
        OptimConfig,
        Projection,
        RopeScaling,
        RunConfig,
        SavingConfig,
    )
    from lumina.config.visible import (
        VISIBLE,
        VisibleGpu,
        explain_duplicate,
        open_nvml,
        take_device,
        visible_gpus,
        visible_names,
    )

_HOMES = {
    "CHUNK_BYTES": "rows",
    "DEFAULT_PRESET": "loading",
    "FAMILIES": "registry",
    "FORMATS": "registry",
    "HEALTH_RULES": "registry",
    "MIN_VOCAB": "schema",
    "OBJECTIVES": "registry",
    "PRESETS": "loading",
    "PROJECTIONS": "schema",
    "ROW_TILE": "rows",
    "SCHEDULES": "registry",
    "TRACKERS": "registry",
    "TRANSPORTS": "registry",
    "VISIBLE": "visible",
    "Config": "schema",
    "DataConfig": "schema",
    "DataSource": "schema",
    "HealthConfig": "schema",
    "LoraConfig": "schema",
    "ModelConfig": "schema",
    "MonitorConfig": "schema",
    "OptimConfig": "schema",
    "Projection": "schema",
    "Registry": "registry",
    "RopeScaling": "schema",
    "RunConfig": "schema",
    "SavingConfig": "schema",
    "UserError": "errors",
    "VisibleGpu": "visible",
    "did_you_mean": "errors",
    "explain_duplicate": "visible",
    "load": "loading",
    "open_nvml": "visible",
    "output_chunk_bytes": "rows",
    "parse_settings": "loading",
    "preset_names": "loading",
    "round_up": "rows",
    "run_config": "loading",
    "take_device": "visible",
    "upgrade": "renamed",
    "visible_gpus": "visible",
    "visible_names": "visible",
}

__all__ = [
    "CHUNK_BYTES",
    "DEFAULT_PRESET",
    "FAMILIES",
    "FORMATS",
    "HEALTH_RULES",
    "MIN_VOCAB",
    "OBJECTIVES",
    "PRESETS",
    "PROJECTIONS",
    "ROW_TILE",
    "SCHEDULES",
    "TRACKERS",
    "TRANSPORTS",
    "VISIBLE",
    "Config",
    "DataConfig",
    "DataSource",
    "HealthConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "Projection",
    "Registry",
    "RopeScaling",
    "RunConfig",
    "SavingConfig",
    "UserError",
    "VisibleGpu",
    "deepspeed",
    "did_you_mean",
    "explain_duplicate",
    "load",
    "open_nvml",
    "output_chunk_bytes",
    "parse_settings",
    "precision",
    "preset_names",
    "private_names",
    "registry",
    "round_up",
    "run_config",
    "schema",
    "take_device",
    "upgrade",
    "versions",
    "visible_gpus",
    "visible_names",
]

__getattr__ = names_of(__name__, _HOMES)
