"""Checkpoint format: names of folders and files, and the record of trainer.json. Loads no torch.

A checkpoint is a folder `step-00000120` of one safetensors file per rank, `trainer.json` and `manifest.json`. It is
written under a name of its own that begins with a dot (lumina.checkpoint.write), flushed, hashed into the manifest, and
only then named. A kill at any moment leaves either the folder without its name, which is ignored, or the whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lumina.files import FormatError, read_object

FORMAT = 1
MANIFEST, TRAINER, BEST = "manifest.json", "trainer.json", "best.json"
MASTER = "master"  # the key of the float32 weights; the others are the optimizer's moments
NAME = re.compile(r"^step-(\d{8,})$")


@dataclass
class TrainerState:
    """What trainer.json records beside the weights. `step` counts optimizer steps done, which is also the position in
    the data (law 1). Its keys are the format's: those of 0.1.0 are read, and unknown ones are left alone."""

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
    guard: dict[str, Any] = field(default_factory=dict)  # of the spike detector, by the key that 0.1.0 wrote
    lora: dict[str, Any] = field(default_factory=dict)  # rank, alpha and targets of the adapters that are all it holds
    chat_template: str = ""  # Lumina's own that it was trained with; none of an imported model, or of before 0.3.0
    rotary_angles: str = ""  # the dtype in which they are computed; none of before it was recorded: either
    base: dict[str, str] = field(default_factory=dict)  # the checkpoint under them (lumina.checkpoint.base_reference)


def name_of(step: int) -> str:
    """The name of a step's checkpoint folder."""
    return f"step-{step:08d}"


def rank_name(rank: int, world: int) -> str:
    """The name of a rank's safetensors file."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Named checkpoints, newest first."""
    found = [path for path in folder.glob("step-*") if NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def read_trainer_state(checkpoint: Path) -> tuple[TrainerState, dict[str, Any]]:
    """The record of trainer.json, and all that the file holds (optimizer_step and loss_scale too). OSError and
    FormatError as of lumina.files.read_json, and FormatError for a value of another kind than the field's."""
    trainer = read_object(checkpoint / TRAINER)
    known = {name: trainer[name] for name in TrainerState.__dataclass_fields__ if name in trainer}
    try:
        return _checked().validate_python(known), trainer
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FormatError(
            f"{checkpoint / TRAINER}: `{where}` is {str(first['input'])[:100]!r}: {first['msg']}"
        ) from None


@cache
def _checked() -> TypeAdapter[TrainerState]:
    return TypeAdapter(TrainerState)
