"""A checkpoint's contents: taken from an engine, and loaded into one of any world size and ZeRO stage.

The folder's form is lumina.train.store's, its writing lumina.train.writing's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lumina.config import UserError
from lumina.train.deepspeed.engine import Engine
from lumina.train.deepspeed.fragments import (
    MASTER,
    fragments,
    moments,
    prepare_moments,
    publish,
    raw_step_count,
    to_load,
)
from lumina.train.deepspeed.slabs import HostCopies
from lumina.train.reading import Reader, open_weights
from lumina.train.store import (
    BEST,
    FORMAT,
    MANIFEST,
    TRAINER,
    Progress,
    best_step,
    candidates,
    checkpoints,
    damage,
    digest,
    mark_best,
    name_of,
    newest_sound,
    prune,
    read_progress,
    write_json,
)

__all__ = [
    "BEST",
    "FORMAT",
    "MANIFEST",
    "MASTER",
    "TRAINER",
    "HostCopies",
    "Progress",
    "Reader",
    "Snapshot",
    "best_step",
    "candidates",
    "checkpoints",
    "damage",
    "digest",
    "load",
    "load_weights",
    "mark_best",
    "name_of",
    "newest_sound",
    "prune",
    "read_progress",
    "read_weights",
    "take",
    "write_json",
]


# --- Taking ---------------------------------------------------------------------------------------


@dataclass
class Snapshot:
    """A copy in host memory of what this rank owns at one step, and what trainer.json will say. Each tensor is a list
    of flat parts. It is there, and trainer.json complete, after `wait`."""

    step: int
    tensors: dict[str, list[torch.Tensor]]
    ranges: dict[str, list[int]]
    trainer: dict[str, Any] = field(default_factory=dict)
    copied: Any = None  # the event behind the copies; None: they are there
    counter: torch.Tensor | None = None  # the optimizer's step count, copied too
    sources: list[torch.Tensor] = field(default_factory=list)  # whose memory must not be freed before

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for parts in self.tensors.values() for part in parts)

    def wait(self) -> None:
        """Wait on the host until the copies are there."""
        if self.copied is not None:
            self.copied.synchronize()
        self.sources.clear()
        if self.counter is not None:
            self.trainer["optimizer_step"] = int(self.counter[0])

    def finite(self) -> bool:
        """Whether every number of it is."""
        self.wait()
        parts = (part for parts in self.tensors.values() for part in parts if part.is_floating_point())
        return all(bool(torch.isfinite(part).all()) for part in parts)


def take(engine: Engine, progress: Progress, copies: HostCopies | None = None) -> Snapshot:
    """Begin to copy this rank's state; not collective, and the host does not wait for a GPU. `copies` holds the memory
    of earlier snapshots, of which nobody may need the last one any more; `copies.before_update()` must be called before
    the next update."""
    copies = HostCopies(engine.device) if copies is None else copies
    values: dict[str, torch.Tensor] = {}
    ranges: dict[str, list[int]] = {}
    for piece in fragments(engine):
        ranges[piece.name] = [piece.start, piece.numel]
        for key, value in {MASTER: piece.view(piece.owner), **moments(engine, piece)}.items():
            values[f"{key}/{piece.name}"] = value
    steps = raw_step_count(engine)  # on a GPU reading it would wait for the update
    counter = {"": steps.detach().view(1)} if isinstance(steps, torch.Tensor) else {}
    tensors, copied = copies.copy(values | counter)
    trainer = {**asdict(progress), "loss_scale": engine.loss_scale()}
    if not counter:
        trainer["optimizer_step"] = int(steps)
    return Snapshot(
        progress.step,
        {"rng/cpu": [torch.get_rng_state()], **{name: tensors[name] for name in values}},
        ranges,
        trainer,
        copied,
        tensors[""][0] if counter else None,
        [*values.values(), *counter.values()],
    )


# --- Reading --------------------------------------------------------------------------------------


@torch.no_grad()
def load(checkpoint: Path, engine: Engine, trainer: dict[str, Any]) -> None:
    """Load weights and optimizer state into an engine of any world size and ZeRO stage; collective."""
    reader = Reader(checkpoint)
    prepare_moments(engine, reader.keys, int(trainer["optimizer_step"]))
    for piece in to_load(engine):
        targets = {MASTER: piece.view(piece.owner)}
        targets |= {key: piece.view(engine.optimizer.state[piece.owner][key]) for key in reader.keys}
        for key, view in targets.items():
            host = torch.empty(piece.numel, dtype=torch.float32)
            reader.read(key, piece.name, piece.start, host)
            view.copy_(host)
    engine.set_loss_scale(trainer["loss_scale"])
    if reader.world == dist.get_world_size():
        torch.set_rng_state(reader.rng(dist.get_rank()))
    publish(engine)
    dist.barrier()


@torch.no_grad()
def load_weights(checkpoint: Path, engine: Engine) -> None:
    """Load the weights alone into a fresh engine, adapters merged; collective."""
    reader = open_weights(checkpoint)
    for piece in to_load(engine):
        host = torch.empty(piece.numel, dtype=torch.float32)
        reader.read(MASTER, piece.name, piece.start, host)
        piece.view(piece.owner).copy_(host)
    publish(engine)
    dist.barrier()


def read_weights(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The float32 weights by name, whole, for generation and export: no engine, no process group, no pickle."""
    reader = open_weights(checkpoint)
    missing = set(shapes) - reader.names()
    if missing:
        raise UserError(f"{checkpoint} has no weights for {sorted(missing)[0]}", "It was written by another model.")
    weights = {}
    for name, shape in shapes.items():
        if reader.numel(name) != shape.numel():
            raise UserError(f"{checkpoint}: {name} has {reader.numel(name)} elements, the model has {shape.numel()}")
        weights[name] = torch.empty(shape.numel(), dtype=torch.float32)
        reader.read(MASTER, name, 0, weights[name])
        weights[name] = weights[name].view(shape)
    return weights
