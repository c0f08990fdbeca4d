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
from lumina.train.engine import Engine
from lumina.train.reading import Reader, open_weights
from lumina.train.state import MASTER, fragments, moments, prepare_moments, publish, step_count, to_load
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
    """A copy in host memory of what this rank owns at one step, and what trainer.json will say."""

    step: int
    tensors: dict[str, torch.Tensor]
    ranges: dict[str, list[int]]
    trainer: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def take(engine: Engine, progress: Progress, buffers: dict[str, torch.Tensor] | None = None) -> Snapshot:
    """Copy this rank's state; not collective. `buffers` are the host tensors of an earlier snapshot that nobody needs
    any more: memory touched before is copied to several times as fast as fresh memory (page faults), and pinned memory
    faster still. They are added to."""
    buffers = {} if buffers is None else buffers
    tensors: dict[str, torch.Tensor] = {"rng/cpu": torch.get_rng_state()}
    ranges: dict[str, list[int]] = {}
    for piece in fragments(engine):
        ranges[piece.name] = [piece.start, piece.numel]
        for key, value in {MASTER: piece.view(piece.owner), **moments(engine, piece)}.items():
            name = f"{key}/{piece.name}"
            host = buffers.get(name)
            if host is None or host.shape != value.shape or host.dtype != value.dtype:
                host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                buffers[name] = host
            host.copy_(value, non_blocking=True)
            tensors[name] = host
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    trainer = {**asdict(progress), "optimizer_step": step_count(engine), "loss_scale": engine.loss_scale()}
    return Snapshot(progress.step, tensors, ranges, trainer)


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
