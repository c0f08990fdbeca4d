"""The resolved settings of a start, and the engine that they make: model, adapters, float8, DeepSpeed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lumina.config import MEMORY_SETTINGS, Config
from lumina.config import deepspeed as ds_json
from lumina.model import HostCopies, Transformer, float8, lora, sequence_group
from lumina.plan import default_document, smallest_memory
from lumina.train.deepspeed import (
    Engine,
    allocate_optimizer_state,
    partitioned_init,
    refuse_what_deepspeed_does,
    set_collective_timeout,
)
from lumina.train.initialise import Start
from lumina.train.saving.snapshot import Together, alone, load_frozen_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """config: resolved, nothing in it depends on the machine any more; ds_config: DeepSpeed's; report: what was
    resolved, for people; base: the checkpoint under the adapters, None where every weight is trained;
    sequence_parallel_size: the run's own, where `config` has what fits the ranks of this start; batches: the run's own
    micro-batch and accumulation, by the names of their settings, where `config` has what fits their memory; memory:
    what decides how large a micro-batch fits a rank, numbers by name: more of one is more room
    (lumina.train.recovery.record)."""

    config: Config
    ds_config: dict[str, Any]
    report: Sequence[str] = ()
    base: Path | None = None
    sequence_parallel_size: int = 1
    batches: Mapping[str, int] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        return next((name for name in ("bf16", "fp16") if self.ds_config.get(name, {}).get("enabled")), "fp32")

    @property
    def kept(self) -> Config:
        """What config.yaml is to have, for later starts, which may have more ranks or more memory than this one."""
        return self.config.replace(sequence_parallel_size=self.sequence_parallel_size, **self.batches)

    def with_micro_batch(self, size: int, world: int) -> Settings:
        """The same with another micro-batch; the global batch, which laws 1 and 2 hang on, stays."""
        wanted = self.config.global_batch_size
        assert wanted is not None
        accumulation = -(-wanted // (size * (world // self.config.sequence_parallel_size)))
        config = self.config.replace(batch_size=size, gradient_accumulation_steps=accumulation)
        batches = {
            "train_micro_batch_size_per_gpu": size,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": size * accumulation * world,
        }
        return replace(self, config=config, ds_config={**self.ds_config, **batches})


def resolve(start: Start, world: int, device: str) -> Settings:
    """The settings of a start of `world` processes. `device`: cuda or cpu."""
    memory = smallest_memory()  # of all ranks: before what one of them may fail at alone, which the others would miss
    config = _with_first_batch(start, world, device)
    document = default_document(config, world, memory)
    ds_config, report, resolved = ds_json.resolve(config, world, device, document=document)
    refuse_what_deepspeed_does(ds_config, config.ds_config or "the built-in DeepSpeed configuration")
    room = _room(resolved, ds_config, world, memory)
    report = [*report, *_rope_scaling(resolved)]
    batches = {name: getattr(resolved, name) for name in ("batch_size", "gradient_accumulation_steps")}
    settings = Settings(resolved, ds_config, report, None, start.ranks_of_row, batches, room)
    fitting, old = start.recovery.largest_micro_batch(room), start.recovery.micro_batch_size
    if fitting is None or fitting >= resolved.batch_size:
        return settings
    if fitting == old:
        line = (
            f"micro-batches of {old}, not {resolved.batch_size}: recovery.json has them from a version that did not "
            "record the memory; where there is more by now, remove `micro_batch_size` from that file"
        )
        settings = replace(settings, report=[*report, line])
    return settings.with_micro_batch(fitting, world)


def _room(config: Config, ds_config: dict[str, Any], world: int, memory: float | None) -> dict[str, float]:
    """`Settings.memory`. memory: bytes of the smallest GPU, None on a CPU."""
    zero = ds_config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    offloaded = [(zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")]
    # The default stage rises where ranks are lost, as what they divide does not fit otherwise: that is no more room.
    chosen = {} if config.ds_config is None else {"zero_stage": float(stage)}
    return {
        "device_bytes": float(memory or 0),
        "sequence_parallel_size": float(config.sequence_parallel_size),
        **chosen,
        "zero_ranks": float(world if stage else 1),  # between which the weights' state is divided
        "offloaded": float(sum(offloaded)),
        "half_precision": float(config.precision != "fp32"),
        **{one.name: one.saving(config) for one in MEMORY_SETTINGS},
    }


def _with_first_batch(start: Start, world: int, device: str) -> Config:
    """The start's configuration with a global batch where no file of the run has one yet: of as many ranks as the
    launch began with, whatever it has lost since."""
    config, began = start.config, start.first_world
    if began is None or began == world or config.global_batch_size is not None:
        return config
    first = config.replace(sequence_parallel_size=start.ranks_of_row)
    size = ds_json.resolve(first, began, device, document=None).config.global_batch_size
    return config.replace(global_batch_size=size)


def _rope_scaling(config: Config) -> list[str]:
    """What scales the rotary angles, for people; no line where nothing does."""
    scaling = config.rope_scaling
    if scaling is None:
        return []
    original, trained = scaling.original_max_position_embeddings, config.trained_seq_length
    counted = "" if original is None else f" from original_max_position_embeddings {original:,}"
    weights = "" if trained is None else f"; the weights it began with were trained at {trained:,}"
    return [
        f"rope_scaling: {scaling.type}, factor {scaling.factor:g}{counted}, seq_length {config.seq_length:,}{weights}"
    ]


def make_engine(settings: Settings, drawn: bool, together: Together = alone) -> Engine:
    """`drawn`: False where every trained weight is loaded next; adapters are drawn after the weights under them.
    `together`: as in load_checkpoint, of the weights under adapters."""
    config, base = settings.config, settings.base
    drawn = drawn or base is not None
    with partitioned_init.partition_on_init(settings.ds_config, drawn):
        model = Transformer(config)
        if base is not None:  # before the engine is made: what is frozen has no place in its optimizer
            lora.attach(model, config)
    if base is not None:
        together(partial(load_frozen_weights, model, base))
    if config.float8 is not None:
        float8.check(config)
        float8.convert(model, config.float8)
    model.checkpoint_every = config.checkpoint_every
    model.host_copies = HostCopies() if config.activation_offloading else None
    model.tile_feed_forward(config.mlp_tile_tokens or 0)
    model.group_heads(config.attention_head_groups)
    sequence = sequence_group(config.sequence_parallel_size)
    if sequence is not None:
        model.share_rows(sequence)
    if config.compile:
        model.compile_blocks()
    made = Engine(model, config, settings.ds_config)
    set_collective_timeout()
    if config.activation_offloading and made.device.type == "cpu" and torch.distributed.get_rank() == 0:
        log.warning("activation_offloading saves nothing on a CPU, whose memory is the host's: leave it out")
    allocate_optimizer_state(made)
    return made
