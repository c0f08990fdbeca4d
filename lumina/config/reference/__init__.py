"""Reference of the settings: sections, meaning, type and default of each, and a configuration as commented YAML."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lumina.config.registry import FAMILIES, OBJECTIVES, SCHEDULES, TRACKERS
from lumina.config.schema import (
    Config,
    DataConfig,
    HealthConfig,
    LoraConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    SavingConfig,
)

SECTIONS: dict[str, type[BaseModel]] = {
    "Model": ModelConfig,
    "Optimisation": OptimConfig,
    "Adapters": LoraConfig,
    "Data": DataConfig,
    "Run": RunConfig,
    "Health and recovery": HealthConfig,
    "Checkpoints and backups": SavingConfig,
    "Monitoring": MonitorConfig,
}
_NAMES = {"family": FAMILIES, "objective": OBJECTIVES, "lr_scheduler": SCHEDULES, "trackers": TRACKERS}

_BEGINNING = """# Configuration

Every setting of a run: a key of the YAML file, `--set KEY=VALUE` on the command line, and a flag of `lumina train`
where one is named. Lowest first: preset, YAML file, flags, `--set`. What has no default is unset, or the preset's
([presets.md](presets.md)). `lumina config show PRESET` prints a whole file with these comments, to begin your own with.
Made by `lumina config reference > docs/configuration.md`.
"""


@functools.cache
def meanings() -> dict[str, str]:
    """Each setting's meaning in a line."""
    text = resources.files("lumina.config.reference").joinpath("meanings.yaml").read_text(encoding="utf-8")
    found: dict[str, str] = yaml.safe_load(text)
    return found


def type_of(name: str) -> str:
    """A setting's type with its bounds or its choices, in words."""
    kind = _words(_schema()["properties"][name])
    return kind.replace("text", " or ".join(_NAMES[name].names())) if name in _NAMES else kind


@functools.cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _words(schema: Mapping[str, Any]) -> str:
    """A JSON schema of our fields in words."""
    if "anyOf" in schema:
        return " or ".join(_words(one) for one in schema["anyOf"] if one != {"type": "null"})
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "$ref" in schema:
        return "mapping"
    if schema["type"] == "array":
        return f"list of {_words(schema['items'])}"
    words = {"boolean": "true or false", "string": "text", "integer": "whole number", "number": "number"}
    bounds = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "to"}
    limits = [f"{word} {schema[key]:g}" for key, word in bounds.items() if key in schema]
    return " ".join([words.get(schema["type"], "mapping"), *limits])


def default_of(name: str) -> str:
    """A setting's default as it would stand in YAML; empty where a preset gives it, or it is unset."""
    default = Config.model_fields[name].default
    return "" if default is PydanticUndefined or default is None else json.dumps(default)


def settings_reference(flags: Mapping[str, str]) -> str:
    """The settings as a document in Markdown. `flags`: the flag of `lumina train` for those that have one."""
    parts = [_BEGINNING]
    for title, section in SECTIONS.items():
        lines = [f"## {title}\n", "| key | type | default | flag | meaning |", "|---|---|---|---|---|"]
        for name in section.model_fields:
            flag = f"`{flags[name]}`" if name in flags else ""
            default = f"`{default_of(name)}`" if default_of(name) else ""
            lines.append(f"| `{name}` | {type_of(name)} | {default} | {flag} | {meanings()[name]} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def commented_yaml(config: Config) -> str:
    """A configuration as YAML that `load` reads back, each setting under a comment that says what it means. `resume`
    and `init_from` belong to one start and are left out."""
    values = config.values()
    parts = []
    for title, section in SECTIONS.items():
        parts.append(f"# --- {title}\n")
        for name in section.model_fields:
            if name not in ("resume", "init_from"):
                setting = yaml.safe_dump({name: values[name]}, sort_keys=False, allow_unicode=True)
                parts.append(f"\n# {meanings()[name]}\n{setting}")
        parts.append("\n")
    return "".join(parts)
