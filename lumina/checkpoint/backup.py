"""Backups: where a run's go, and copying a checkpoint back. Loads no torch."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from lumina.checkpoint.integrity import integrity_error
from lumina.checkpoint.retention import discard
from lumina.config import UserError, parse_yaml
from lumina.files import fsync, read_text


def backup_folder(run: Path) -> Path | None:
    """Where the run's configuration says that its backups go."""
    try:
        settings = parse_yaml(read_text(run / "config.yaml"), "config.yaml")[0]
        return Path(str(settings["backup_dir"])) / str(settings["experiment_name"]) if settings["backup_dir"] else None
    except (OSError, UserError, KeyError):
        return None


def copy_checkpoint(source: Path, folder: Path) -> Path:
    """Copy a whole checkpoint into another folder of checkpoints, in the place of one of its name; returns its path.
    Raises UserError, and changes nothing, when the copy is not whole."""
    final = folder / source.name
    partial = folder / f".{source.name}.restored-{secrets.token_hex(4)}.partial"
    shutil.copytree(source, partial)
    for file in partial.iterdir():
        fsync(file)
    fsync(partial)
    wrong = integrity_error(partial)
    if wrong is not None:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"the copy of {source} is damaged: {wrong}", "Is the disk full? Nothing was changed.")
    if final.is_dir():
        discard(final)
    os.replace(partial, final)
    fsync(folder)
    return final
