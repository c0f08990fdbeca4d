"""Checkpoints that exist whole or not at all (law 5).

A checkpoint is a folder `step-00000120` of one safetensors file per rank, `trainer.json` and `manifest.json`. Every
rank writes its file into `.step-00000120.partial`, flushes it to disk and hashes it; rank 0 writes the manifest of all
sizes and hashes, flushes that, and only then renames the folder. A kill at any moment leaves either the folder without
its name, which is ignored, or the whole. Before loading, every hash is checked, and a damaged checkpoint is passed over
with a warning in favour of the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from lumina.config import UserError
from lumina.train.engine import Engine
from lumina.train.state import MASTER, fragments, moments, prepare_moments, publish, step_count, to_load

log = logging.getLogger("lumina")

FORMAT = 1
MANIFEST, TRAINER, BEST = "manifest.json", "trainer.json", "best.json"
_NAME = re.compile(r"^step-(\d{8,})$")


@dataclass
class Progress:
    """Where a run stands. `step` counts optimizer steps done, which is also the data position (law 1)."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    global_batch_size: int = 0
    data_fingerprint: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = ""
    zero_stage: int = 0
    world: int = 1


# --- Writing --------------------------------------------------------------------------------------


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def save(folder: Path, engine: Engine, progress: Progress) -> Path:
    """Write a checkpoint of all ranks under `folder`; collective. Returns its path, which exists on return."""
    rank, world = dist.get_rank(), dist.get_world_size()
    final, partial = folder / name_of(progress.step), folder / f".{name_of(progress.step)}.partial"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    dist.barrier()
    own = partial / f"rank-{rank:05d}-of-{world:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {"rng/cpu": torch.get_rng_state()}
    ranges: dict[str, list[int]] = {}
    for piece in fragments(engine):
        ranges[piece.name] = [piece.start, piece.numel]
        for key, value in {MASTER: piece.view(piece.owner), **moments(engine, piece)}.items():
            tensors[f"{key}/{piece.name}"] = value.cpu().contiguous()
    save_file(tensors, own, metadata={"ranges": json.dumps(ranges)})
    _sync(own)
    entries: list[Any] = [None] * world
    dist.all_gather_object(entries, _entry(own))
    if rank == 0:
        trainer = {**asdict(progress), "optimizer_step": step_count(engine), "loss_scale": engine.loss_scale()}
        write_json(partial / TRAINER, trainer)
        entries.append(
            {"name": TRAINER, "bytes": (partial / TRAINER).stat().st_size, "sha256": digest(partial / TRAINER)}
        )
        write_json(partial / MANIFEST, {"format": FORMAT, "files": entries})
        _sync(partial)
        if final.exists():  # left by an earlier life of the run: damaged, or passed over when resuming from before it
            os.replace(final, final.with_name(f".{final.name}.doomed"))
        os.replace(partial, final)
        _sync(folder)
    dist.barrier()
    return final


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one. Rank 0 only."""
    best = best_step(folder)
    for path in checkpoints(folder)[keep_last:]:
        if best is None or path.name != name_of(best):
            doomed = path.with_name(f".{path.name}.doomed")
            os.replace(path, doomed)  # unnamed first: a kill while deleting leaves no half checkpoint behind
            shutil.rmtree(doomed, ignore_errors=True)
    for leftover in [*folder.glob(".*.doomed"), *folder.glob(".*.partial")]:
        shutil.rmtree(leftover, ignore_errors=True)


def mark_best(folder: Path, step: int, loss: float) -> None:
    write_json(folder / BEST, {"step": step, "loss": loss})


def best_step(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / BEST).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- Finding and checking -------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Named checkpoints, newest first."""
    found = [path for path in folder.glob("step-*") if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None when every size and hash is right."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = [(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} has format {manifest.get('format')}, this version reads {FORMAT}"
    names = [name for name, *_ in files]
    if TRAINER not in names or not any(name.startswith("rank-") for name in names):
        return f"{MANIFEST} does not name {TRAINER} and the files of the ranks"
    for name, size, sha256 in files:
        path = checkpoint / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if digest(path) != sha256:
            return f"{name} does not match its hash"
    return None


def newest_sound(candidates: list[Path]) -> Path | None:
    """The first candidate without damage; the damaged ones before it are reported."""
    for checkpoint in candidates:
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        log.warning("checkpoint %s is damaged: %s; trying the one before it", checkpoint, wrong)
    return None


def candidates(path: str | Path) -> list[Path]:
    """Checkpoints that a path given by a user means, best choice first: a run's folder, its checkpoints folder, or one
    checkpoint (with the older ones of its run behind it, in case it is damaged).

    Raises UserError when there is none.
    """
    given = Path(path)
    if _NAME.match(given.name) and given.is_dir():
        older = [c for c in checkpoints(given.parent) if _step_of(c) < _step_of(given)]
        return [given, *older]
    for folder in (given / "checkpoints", given):
        if folder.is_dir() and (found := checkpoints(folder)):
            return found
    raise UserError(
        f"no checkpoint at {given}", "Give a run's folder (experiments/NAME) or one of its checkpoints/step-… folders."
    )


def read_progress(checkpoint: Path) -> tuple[Progress, dict[str, Any]]:
    """The progress and the whole of trainer.json."""
    trainer = json.loads((checkpoint / TRAINER).read_text())
    known = {name: trainer[name] for name in Progress.__dataclass_fields__ if name in trainer}
    return Progress(**known), trainer


# --- Reading --------------------------------------------------------------------------------------


class Reader:
    """Reads ranges of parameters and moments from a checkpoint's rank files, whatever world size wrote them."""

    def __init__(self, checkpoint: Path) -> None:
        self._files: list[Any] = [
            safe_open(path, framework="pt") for path in sorted(checkpoint.glob("rank-*.safetensors"))
        ]
        self._homes: dict[str, list[tuple[int, int, Any]]] = {}
        self.keys: list[str] = []
        for file in self._files:
            metadata: dict[str, str] = file.metadata()
            for name, (start, numel) in json.loads(metadata["ranges"]).items():
                self._homes.setdefault(name, []).append((start, numel, file))
            stored: list[str] = file.keys()
            self.keys = sorted({*self.keys, *(key.split("/", 1)[0] for key in stored)} - {"rng", MASTER})

    @property
    def world(self) -> int:
        return len(self._files)

    def names(self) -> set[str]:
        return set(self._homes)

    def numel(self, name: str) -> int:
        return max(start + numel for start, numel, _ in self._homes[name])

    def read(self, key: str, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D) with elements [start, start + len(out)) of `key` (master or a moment) of a parameter."""
        end, done = start + out.numel(), 0
        for home, numel, file in self._homes[name]:
            low, high = max(start, home), min(end, home + numel)
            if low < high:
                out[low - start : high - start] = file.get_slice(f"{key}/{name}")[low - home : high - home]
                done += high - low
        assert done == out.numel(), f"the checkpoint covers {done} of {out.numel()} elements of {key}/{name}"

    def rng(self, rank: int) -> torch.Tensor:
        return self._files[rank].get_tensor("rng/cpu")  # type: ignore[no-any-return]


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
    """Load the weights alone into a fresh engine; collective."""
    reader = Reader(checkpoint)
    for piece in to_load(engine):
        host = torch.empty(piece.numel, dtype=torch.float32)
        reader.read(MASTER, piece.name, piece.start, host)
        piece.view(piece.owner).copy_(host)
    publish(engine)
    dist.barrier()


def read_weights(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The float32 weights by name, whole, for generation and export: no engine, no process group, no pickle."""
    reader = Reader(checkpoint)
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
