"""Checkpoints of adapters: the checkpoint under them, and its weights with the adapters merged in.

A run that trains adapters (lumina.model.lora) saves only these. Its trainer.json names the checkpoint that they were
trained over and the hash of that one's manifest, which has the hashes of its files: what is merged is what was trained
over, or an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lumina.checkpoint.format import MANIFEST, MASTER, TrainerState, read_trainer_state
from lumina.checkpoint.integrity import integrity_error
from lumina.checkpoint.read import CheckpointReader, WeightReader
from lumina.config import LoraConfig, ModelConfig, UserError
from lumina.files import file_sha256
from lumina.model import lora


def adapter_settings(config: LoraConfig) -> dict[str, Any]:
    """The adapter settings of trainer.json, on which the adapters' values depend; empty without adapters."""
    if not config.lora_rank:
        return {}
    rank, targets = config.lora_rank, sorted(config.lora_targets)
    return {"lora_rank": rank, "lora_alpha": config.lora_scale * rank, "lora_targets": targets}


def base_reference(base: Path, folder: Path) -> dict[str, str]:
    """Relative path, absolute path and manifest hash of the base checkpoint, as trainer.json of a run in `folder` keeps
    them: the run and its base may be moved together, or the run alone, and another checkpoint is not taken for it."""
    base = base.resolve()
    return {
        "checkpoint": str(base),
        "from_run": os.path.relpath(base, folder.resolve()),
        "manifest_sha256": file_sha256(base / MANIFEST),
    }


def base_checkpoint(checkpoint: Path, state: TrainerState) -> Path | None:
    """The base checkpoint of a checkpoint of adapters, None for one that holds whole weights.

    Raises:
        UserError: it is not there, or is not the one that the adapters were trained over.
    """
    if not state.lora:
        return None
    named = state.base
    run = checkpoint.resolve().parent.parent
    paths = [run / named.get("from_run", ""), Path(named.get("checkpoint", ""))]
    found = [path for path in paths if (path / MANIFEST).is_file()]
    for path in found:
        if file_sha256(path / MANIFEST) == named.get("manifest_sha256"):
            return path
    raise UserError(
        f"{checkpoint} holds adapters over {paths[1]}, which {'has other contents now' if found else 'is not there'}",
        f"Bring that checkpoint back, there or to {os.path.normpath(paths[0])}.",
    )


def valid_base(checkpoint: Path, state: TrainerState) -> Path | None:
    """The base checkpoint with every hash checked, None as `base_checkpoint`. Raises UserError."""
    base = base_checkpoint(checkpoint, state)
    wrong = integrity_error(base) if base is not None else None
    if wrong is not None:
        raise UserError(
            f"{base}, which the adapters of {checkpoint} belong to, is damaged: {wrong}",
            "Restore it from a backup: lumina checkpoints restore RUN.",
        )
    return base


def saved_adapter_settings(checkpoint: Path, state: TrainerState) -> tuple[LoraConfig, ModelConfig]:
    """The adapters' settings and the shape of the model that they belong to. Raises UserError when trainer.json does
    not say them."""
    shape = dict(state.model)
    try:
        settings = LoraConfig(**state.lora)
        width = shape.pop("ffn_size", None)
        return settings, ModelConfig(**shape, intermediate_size=width, seq_length=2)
    except (ValidationError, TypeError) as error:
        raise UserError(f"{checkpoint}: trainer.json does not describe its adapters: {error}") from None


class MergedWeights:
    """Weights of a base checkpoint with adapters merged in; reads like a checkpoint of whole weights."""

    def __init__(self, base: WeightReader, own: CheckpointReader, settings: LoraConfig, shape: ModelConfig) -> None:
        self._base, self._own = base, own
        self._settings, self._shape = settings, shape
        self._shapes = lora.shapes(shape, settings)
        self._newest: tuple[str, torch.Tensor | None] = "", None  # ranges of one parameter are read one after another
        strange = set(self._shapes) ^ own.names()
        if strange:
            raise UserError(f"the adapters are not those that trainer.json describes: {sorted(strange)[0]}")
        for name, (rows, columns) in self._shapes.items():
            if own.numel(name) != rows * columns:
                raise UserError(f"{name} has {own.numel(name)} elements, trainer.json describes {rows} x {columns}")

    def names(self) -> set[str]:
        return self._base.names()

    def numel(self, name: str) -> int:
        return self._base.numel(name)

    def adapter(self, name: str) -> torch.Tensor:
        """One adapter matrix, float32."""
        shape = self._shapes[name]
        flat = torch.empty(shape[0] * shape[1])
        self._own.read(MASTER, name, 0, flat)
        return flat.view(shape)

    def read(self, key: str, name: str, start: int, out: torch.Tensor) -> None:
        """As CheckpointReader.read, of the weights alone."""
        assert key == MASTER, "merged weights have no moments"
        self._base.read(key, name, start, out)
        if self._newest[0] != name:
            self._newest = name, lora.gain(name, self._shape, self._settings, self.adapter)
        gain = self._newest[1]
        if gain is not None:
            if gain.numel() != self.numel(name):
                raise UserError(
                    f"{name} has {self.numel(name)} elements, its adapters {gain.numel()}",
                    "The adapters belong to another model.",
                )
            out += gain.flatten()[start : start + out.numel()]


def open_weights(checkpoint: Path) -> WeightReader:
    """A checkpoint's weights, merged with those under it where it holds adapters. The files of `checkpoint` itself have
    been checked by whoever chose it; those under it are checked here. Raises UserError."""
    state, _ = read_trainer_state(checkpoint)
    base = valid_base(checkpoint, state)
    if base is None:
        return CheckpointReader(checkpoint)
    return MergedWeights(open_weights(base), CheckpointReader(checkpoint), *saved_adapter_settings(checkpoint, state))


def iter_weights(checkpoint: Path, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
    """The float32 weights by name, whole, adapters merged, in the order of `shapes` and one at a time: memory for the
    largest is enough. Raises UserError when the checkpoint has other parameters."""
    reader = open_weights(checkpoint)
    strange = sorted(set(shapes) ^ reader.names())
    if strange:
        which = "does not know" if strange[0] in reader.names() else "also needs"
        raise UserError(f"{checkpoint} was written by another model: this one {which} {strange[0]}")
    for name, shape in shapes.items():
        if reader.numel(name) != shape.numel():
            raise UserError(
                f"{checkpoint}: {name} has {reader.numel(name)} elements, the model has {shape.numel()}",
                "The run's config.yaml does not belong to this checkpoint.",
            )
        flat = torch.empty(shape.numel(), dtype=torch.float32)
        reader.read(MASTER, name, 0, flat)
        yield name, flat.view(shape)
