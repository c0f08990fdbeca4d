"""Every setting of a run, with its type, its default and its bounds.

The classes are mixins of one flat `Config`, so that YAML keys stay flat (the early README's work verbatim) while a room
can ask for only the part that it needs: the model takes a `ModelConfig`, tests build one without a data path.

Units: lengths in tokens, batch sizes in samples, "batch" in `*_every_n_batches` is one global batch, that is one
optimizer step.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import PrivateAttr, model_validator

from lumina.config.schema.experts import Experts
from lumina.config.schema.fields import FIRST_TEMPLATE, MIN_VOCAB, ChatTemplate, Strict
from lumina.config.schema.model import ModelConfig, RopeScaling, Structure
from lumina.config.schema.settings import (
    PROJECTIONS,
    DataConfig,
    DataSource,
    HealthConfig,
    LoraConfig,
    MonitorConfig,
    OptimConfig,
    Projection,
    RunConfig,
    SavingConfig,
)

__all__ = [
    "FIRST_TEMPLATE",
    "GROUPS",
    "MIN_VOCAB",
    "PROJECTIONS",
    "ChatTemplate",
    "Config",
    "DataConfig",
    "DataSource",
    "Experts",
    "HealthConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "Projection",
    "RopeScaling",
    "RunConfig",
    "SavingConfig",
    "Structure",
]

GROUPS: tuple[type[Strict], ...] = (
    ModelConfig,
    OptimConfig,
    LoraConfig,
    DataConfig,
    RunConfig,
    HealthConfig,
    SavingConfig,
    MonitorConfig,
)


class Config(ModelConfig, OptimConfig, LoraConfig, DataConfig, RunConfig, HealthConfig, SavingConfig, MonitorConfig):
    """Every setting, flat. Build one with `lumina.config.loading`, which knows presets, files, flags and where each
    value came from."""

    _explicit: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="after")
    def _experts_have_no_adapters(self) -> Config:
        feed_forward = [name for name in self.lora_targets if name in ("gate_proj", "up_proj", "down_proj")]
        if self.experts is not None and self.lora_rank and feed_forward:
            kept = [name for name in PROJECTIONS if name not in ("gate_proj", "up_proj", "down_proj")]
            raise ValueError(
                f"lora_targets: experts get no adapters ({', '.join(feed_forward)}); "
                f"set lora_targets to [{', '.join(kept)}] or some of these"
            )
        return self

    @model_validator(mode="after")
    def _sequences_can_be_shared(self) -> Config:
        size = self.sequence_parallel_size
        if self.num_heads % size:
            fitting = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"sequence_parallel_size {size} does not divide num_heads {self.num_heads}, which each rank gets an "
                f"equal part of; set it to one of {', '.join(map(str, fitting))}"
            )
        for name, there in {"experts": self.experts is not None, "compile": self.compile}.items():
            if size > 1 and there:
                raise ValueError(
                    f"sequence_parallel_size {size} does not work together with {name}; set it to 1 or leave {name} out"
                )
        return self

    @model_validator(mode="after")
    def _feed_forward_can_be_tiled(self) -> Config:
        if self.mlp_tile_tokens is not None and self.untiled:
            name = self.untiled[0]
            raise ValueError(f"mlp_tile_tokens does not work together with {name}; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _heads_can_be_grouped(self) -> Config:
        groups = self.attention_head_groups
        if groups == 1:
            return self
        if self.ungrouped:
            name = self.ungrouped[0]
            raise ValueError(f"attention_head_groups does not work together with {name}; leave one of the two out")
        fitting = self.fitting_head_groups(self.sequence_parallel_size)
        if groups not in fitting:
            shared = f", each of which {self.sequence_parallel_size} ranks share" * (self.sequence_parallel_size > 1)
            raise ValueError(
                f"attention_head_groups {groups} does not divide the {self.num_heads} query heads and "
                f"{self.num_kv_heads} key/value heads into groups{shared}; set it to one of "
                f"{', '.join(map(str, fitting))}"
            )
        return self

    def fitting_head_groups(self, ranks: int) -> list[int]:
        """Numbers of groups that attention's heads can be taken in where so many ranks share rows, fewest first."""
        divisors = (n for n in range(1, self.num_kv_heads + 1) if self.num_kv_heads % n == 0)
        # Products in 8 bits take sides that are multiples of 16, a group's queries too.
        multiple = 16 if self.float8 else 1
        fitting = (n for n in divisors if self.num_heads // n % ranks == 0)
        return [n for n in fitting if n == 1 or self.num_heads // n * self.head_dim % multiple == 0]

    def saves_by_head_groups(self, precision: str) -> bool:
        """Whether attention in groups of heads takes less memory on a GPU: it needs a kernel for documents of any
        length, which there is in half precision and without a soft cap."""
        return not self.ungrouped and precision != "fp32" and self.attention_softcap is None

    @property
    def ungrouped(self) -> list[str]:
        """What of this configuration attention_head_groups does not work together with."""
        refused = {
            "compile": self.compile,
            "lora_dropout": self.lora_rank > 0 and self.lora_dropout > 0,  # queries are projected twice, drawn anew
            "float8 tensorwise": self.float8 == "tensorwise",  # whose scale is that of all rows
            f"family {self.family}": self.structure.qk_norm == "width",  # which norms all heads together
        }
        return [name for name, there in refused.items() if there]

    @property
    def untiled(self) -> list[str]:
        """What of this configuration mlp_tile_tokens does not work together with."""
        refused = {
            "experts": self.experts is not None,
            "compile": self.compile,
            "lora_dropout": self.lora_rank > 0 and self.lora_dropout > 0,  # a tile is computed twice, drawn anew
            "float8 tensorwise": self.float8 == "tensorwise",  # whose scales are those of all tokens
        }
        return [name for name, there in refused.items() if there]

    @property
    def explicit(self) -> frozenset[str]:
        """Names of the settings that the user wrote down (YAML, flag or --set), as against presets and defaults."""
        return self._explicit

    @classmethod
    def create(cls, values: dict[str, Any], explicit: frozenset[str] | set[str]) -> Config:
        """Validate `values`; raises pydantic.ValidationError (lumina.config.loading turns that into a UserError)."""
        config = cls(**values)
        config._explicit = frozenset(explicit)
        return config

    def replace(self, **changes: Any) -> Config:
        """A validated copy with some values changed, which remembers the same explicit names."""
        return Config.create(self.model_dump() | changes, self._explicit)

    def values(self) -> dict[str, Any]:
        """Every value by name, in the order in which the groups are written above."""
        dumped = self.model_dump()
        return {name: dumped[name] for group in GROUPS for name in group.model_fields}

    def to_yaml(self, *without: str) -> str:
        """Every value as YAML that `load` reads back to an equal configuration, but for `resume`, which belongs to one
        start, and what else is to be left out."""
        kept = {name: value for name, value in self.values().items() if name not in ("resume", *without)}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
