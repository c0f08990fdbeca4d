"""Whether checkpoints and backups can be written where they are to go, asked before the first step: the run would train
until its first save to find out."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lumina import checkpoint
from lumina.config import Config, UserError


def refuse_unwritable(folder: Path) -> None:
    """UserError where `folder`, of the run's checkpoints, or that which it is to be in, takes no file."""
    error = checkpoint.unwritable(folder)
    if error is not None:
        raise UserError(
            f"no checkpoint can be written to {folder}: {error}",
            "Change its permissions, or choose another --output-dir.",
        )


def check_backups(config: Config) -> list[str]:
    """What is wrong with where the run's backups go, for people; nothing where it has none. Before the run is claimed.

    Raises UserError for a run that begins where no later try could do better. One that began before is not ended by its
    backups, here as little as while it trains, and what may pass, a disk that is away or full, ends none."""
    if config.backup_dir is None:
        return []
    folder, run = (Path(parent) / config.experiment_name for parent in (config.backup_dir, config.output_dir))
    error = checkpoint.unwritable(folder)
    if error is None:
        with suppress(OSError):  # looked at a moment ago; if it is away now, a backup that fails says so
            return _same_disk(config) if checkpoint.one_disk(folder, run) else []
        return []
    if error.retry or checkpoint.has_begun(run):
        return [f"WARNING: no backup can be written to {folder} at present: {error}; each one that is due is tried"]
    raise UserError(
        f"no backup can be written to {folder}: {error}",
        "Change its permissions, give another --set backup_dir=FOLDER, or leave the backups out.",
    )


def _same_disk(config: Config) -> list[str]:
    return [
        f"WARNING: backup_dir {config.backup_dir} is on the file system of the run's own folder, and what takes that "
        "takes the backups too: give it a folder of another disk, or mount that disk there"
    ]
