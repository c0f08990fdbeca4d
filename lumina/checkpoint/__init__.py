"""Checkpoints on disk: form, integrity, retention, reading ranges, merging adapters, writing beside the training, and
the lock of a run's folder. Knows names, ranges and safetensors, and nothing of an engine.

What needs torch is loaded on first use: `lumina checkpoints` answers without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lumina.checkpoint.format import (
    BEST,
    FORMAT,
    MANIFEST,
    MASTER,
    TRAINER,
    Progress,
    checkpoints,
    name_of,
    read_progress,
    step_of,
)
from lumina.checkpoint.integrity import candidates, damage, digest, entry, newest_sound, sync, write_json
from lumina.checkpoint.lock import Lease, global_batch
from lumina.checkpoint.maintenance import REQUESTS
from lumina.checkpoint.model_shape import same_model, shape
from lumina.checkpoint.retention import Retention, best_step, clear_leftovers, doom, mark_best, prune

if TYPE_CHECKING:
    from lumina.checkpoint.merge import (
        Merged,
        adapters,
        base_of,
        open_weights,
        read_weights,
        reference,
        saved_adapters,
        sound_base,
        trained_parameters,
    )
    from lumina.checkpoint.read import Reader, Weights
    from lumina.checkpoint.saver import Job, Outcome, Place, Saver, Target
    from lumina.checkpoint.slabs import SLAB, HostCopies, Slabs, slab_sizes
    from lumina.checkpoint.snapshot import Snapshot
    from lumina.checkpoint.write import SaveError, assemble, partial_name, write_part

_WITH_TORCH = {
    "merge": (
        "Merged",
        "adapters",
        "base_of",
        "open_weights",
        "read_weights",
        "reference",
        "saved_adapters",
        "sound_base",
        "trained_parameters",
    ),
    "read": ("Reader", "Weights"),
    "saver": ("Job", "Outcome", "Place", "Saver", "Target"),
    "slabs": ("SLAB", "HostCopies", "Slabs", "slab_sizes"),
    "snapshot": ("Snapshot",),
    "write": ("SaveError", "assemble", "partial_name", "write_part"),
}
_HOMES = {name: module for module, names in _WITH_TORCH.items() for name in names}

__all__ = [
    "BEST",
    "FORMAT",
    "MANIFEST",
    "MASTER",
    "REQUESTS",
    "SLAB",
    "TRAINER",
    "HostCopies",
    "Job",
    "Lease",
    "Merged",
    "Outcome",
    "Place",
    "Progress",
    "Reader",
    "Retention",
    "SaveError",
    "Saver",
    "Slabs",
    "Snapshot",
    "Target",
    "Weights",
    "adapters",
    "assemble",
    "base_of",
    "best_step",
    "candidates",
    "checkpoints",
    "clear_leftovers",
    "damage",
    "digest",
    "doom",
    "entry",
    "global_batch",
    "mark_best",
    "name_of",
    "newest_sound",
    "open_weights",
    "partial_name",
    "prune",
    "read_progress",
    "read_weights",
    "reference",
    "same_model",
    "saved_adapters",
    "shape",
    "slab_sizes",
    "sound_base",
    "step_of",
    "sync",
    "trained_parameters",
    "write_json",
    "write_part",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
