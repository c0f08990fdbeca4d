"""Between an engine and a checkpoint: the snapshot of this rank's state, and loading one into an engine of any world
size and ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lumina.checkpoint import MASTER, CheckpointReader, Snapshot, StagingBuffer, TrainerState, open_weights
from lumina.train.deepspeed import (
    Engine,
    drop_secondary_copy,
    fragments_to_load,
    init_optimizer_state,
    local_shard,
    moments,
    owned_fragments,
    raw_step_count,
    sync_weights,
)


def take_snapshot(engine: Engine, state: TrainerState, copies: StagingBuffer | None = None) -> Snapshot:
    """Begin to copy this rank's state; not collective, and the host does not wait for a GPU. `copies` holds the memory
    of earlier snapshots, of which nobody may need the last one any more; `copies.before_update()` must be called before
    the next update."""
    copies = StagingBuffer(engine.device) if copies is None else copies
    values: dict[str, torch.Tensor] = {}
    ranges: dict[str, list[int]] = {}
    for fragment in owned_fragments(engine):
        ranges[fragment.name] = [fragment.start, fragment.numel]
        for key, value in {MASTER: fragment.view(fragment.owner), **moments(engine, fragment)}.items():
            values[f"{key}/{fragment.name}"] = value
    steps = raw_step_count(engine)  # on a GPU reading it would wait for the update
    counter = {"": steps.detach().view(1)} if isinstance(steps, torch.Tensor) else {}
    tensors, copied = copies.copy(values | counter)
    trainer = {**asdict(state), "loss_scale": engine.loss_scale()}
    if not counter:
        trainer["optimizer_step"] = int(steps)
    return Snapshot(
        state.step,
        {"rng/cpu": [torch.get_rng_state()], **{name: tensors[name] for name in values}},
        ranges,
        trainer,
        copied,
        tensors[""][0] if counter else None,
        [*values.values(), *counter.values()],
    )


OnProgress = Callable[[int, int], None]  # ranges read, ranges that this rank reads in all


# Calls what it is given, which has no collective in it: also so that the ranks have all done so when it returns.
Together = Callable[[Callable[[], None]], object]


def silent(done: int, total: int) -> None:
    """Progress that nobody is shown."""


def alone(read: Callable[[], None]) -> None:
    """The ranks meet in the next collective, or not at all."""
    read()


@torch.no_grad()
def load_checkpoint(
    checkpoint: Path,
    engine: Engine,
    trainer: dict[str, Any],
    progress: OnProgress = silent,
    together: Together = alone,
) -> None:
    """Load weights and optimizer state into an engine of any world size and ZeRO stage; collective. `together`: how the
    ranks come out of reading, which may take one of them longer than a collective waits."""
    reader = CheckpointReader(checkpoint)
    init_optimizer_state(engine, reader.keys, int(trainer["optimizer_step"]))

    def read() -> None:
        fragments = fragments_to_load(engine)
        for number, fragment in enumerate(fragments, 1):
            targets = {MASTER: fragment.view(fragment.owner)}
            targets |= {key: fragment.view(engine.optimizer.state[fragment.owner][key]) for key in reader.keys}
            for key, view in targets.items():
                host = torch.empty(fragment.numel, dtype=torch.float32)
                reader.read(key, fragment.name, fragment.start, host)
                view.copy_(host)
            progress(number, len(fragments))

    together(read)
    engine.set_loss_scale(trainer["loss_scale"])
    if reader.world == dist.get_world_size():
        torch.set_rng_state(reader.rng(dist.get_rank()))
    sync_weights(engine)
    dist.barrier()


@torch.no_grad()
def load_weights(checkpoint: Path, engine: Engine, progress: OnProgress = silent, together: Together = alone) -> None:
    """Load the weights alone into a fresh engine, adapters merged; collective. `together`: as in `load_checkpoint`."""
    reader = open_weights(checkpoint)

    def read() -> None:
        fragments = fragments_to_load(engine)
        for number, fragment in enumerate(fragments, 1):
            host = torch.empty(fragment.numel, dtype=torch.float32)
            reader.read(MASTER, fragment.name, fragment.start, host)
            fragment.view(fragment.owner).copy_(host)
            progress(number, len(fragments))

    together(read)
    sync_weights(engine)
    dist.barrier()


def load_frozen_weights(model: torch.nn.Module, base: Path) -> None:
    """Copy a checkpoint's weights, merged, into the frozen parameters of a model with adapters: of divided ones
    (lumina.train.deepspeed.partitioned_init) this rank reads its own part alone."""
    weights = open_weights(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drop_secondary_copy(parameter)
            if not parameter.requires_grad:
                own, start = local_shard(parameter)
                flat = torch.empty(own.numel())
                weights.read(MASTER, name, start, flat)
                own.copy_(flat)
