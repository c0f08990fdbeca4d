"""Checkpoints on disk: form, integrity, retention, reading ranges, merging adapters, writing beside the training, and
the lock of a run's folder. Knows names, ranges and safetensors, and nothing of an engine.

What needs torch is loaded on first use: `lumina checkpoints` answers without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lumina.checkpoint.backup import backup_folder, copy_checkpoint
from lumina.checkpoint.choices import model_choices, run_path
from lumina.checkpoint.format import (
    BEST,
    FORMAT,
    MANIFEST,
    MASTER,
    TRAINER,
    TrainerState,
    list_checkpoints,
    name_of,
    read_trainer_state,
    step_of,
)
from lumina.checkpoint.integrity import (
    ManifestError,
    candidates,
    integrity_error,
    latest_valid,
    manifest_entry,
    rank_files,
)
from lumina.checkpoint.lock import RunLock, has_begun, last_global_batch, last_launch, owned_by, refuse_owned
from lumina.checkpoint.model_shape import check_same_model, model_shape, other_angles, rotary_angles
from lumina.checkpoint.requests import SaveReply, SaveRequests, request_save
from lumina.checkpoint.retention import Retention, best_step, clear_leftovers, discard, prune, record_best

if TYPE_CHECKING:
    from lumina.checkpoint.merge import (
        MergedWeights,
        adapter_settings,
        base_checkpoint,
        base_reference,
        iter_weights,
        open_weights,
        saved_adapter_settings,
        valid_base,
    )
    from lumina.checkpoint.read import CheckpointReader, WeightReader
    from lumina.checkpoint.saver import SaveJob, SaveKind, SaveOutcome, Saver, SaveTarget
    from lumina.checkpoint.snapshot import Snapshot
    from lumina.checkpoint.staging import SLAB, Slabs, StagingBuffer, slab_sizes
    from lumina.checkpoint.write import (
        SaveError,
        commit,
        one_disk,
        partial_name,
        unwritable,
        write_checkpoint,
        write_rank_file,
    )

_WITH_TORCH = {
    "merge": (
        "MergedWeights",
        "adapter_settings",
        "base_checkpoint",
        "open_weights",
        "iter_weights",
        "base_reference",
        "saved_adapter_settings",
        "valid_base",
    ),
    "read": ("CheckpointReader", "WeightReader"),
    "saver": ("SaveJob", "SaveOutcome", "SaveKind", "Saver", "SaveTarget"),
    "staging": ("SLAB", "StagingBuffer", "Slabs", "slab_sizes"),
    "snapshot": ("Snapshot",),
    "write": (
        "SaveError",
        "commit",
        "one_disk",
        "partial_name",
        "unwritable",
        "write_checkpoint",
        "write_rank_file",
    ),
}
_HOMES = {name: module for module, names in _WITH_TORCH.items() for name in names}

__all__ = [
    "BEST",
    "FORMAT",
    "MANIFEST",
    "MASTER",
    "SLAB",
    "TRAINER",
    "CheckpointReader",
    "ManifestError",
    "MergedWeights",
    "Retention",
    "RunLock",
    "SaveError",
    "SaveJob",
    "SaveKind",
    "SaveOutcome",
    "SaveReply",
    "SaveRequests",
    "SaveTarget",
    "Saver",
    "Slabs",
    "Snapshot",
    "StagingBuffer",
    "TrainerState",
    "WeightReader",
    "adapter_settings",
    "backup_folder",
    "base_checkpoint",
    "base_reference",
    "best_step",
    "candidates",
    "check_same_model",
    "clear_leftovers",
    "commit",
    "copy_checkpoint",
    "discard",
    "has_begun",
    "integrity_error",
    "iter_weights",
    "last_global_batch",
    "last_launch",
    "latest_valid",
    "list_checkpoints",
    "manifest_entry",
    "model_choices",
    "model_shape",
    "name_of",
    "one_disk",
    "open_weights",
    "other_angles",
    "owned_by",
    "partial_name",
    "prune",
    "rank_files",
    "read_trainer_state",
    "record_best",
    "refuse_owned",
    "request_save",
    "rotary_angles",
    "run_path",
    "saved_adapter_settings",
    "slab_sizes",
    "step_of",
    "unwritable",
    "valid_base",
    "write_checkpoint",
    "write_rank_file",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
