"""`lumina checkpoints`: list, verify, prune and restore a run's checkpoints, and ask a running job for one. Loads no
torch."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lumina.checkpoint import format, integrity, retention
from lumina.config import UserError
from lumina.files import fsync, write_json

REQUESTS = "requests"  # folder in the run's: save-ID.json asks, save-ID.answer.json answers


def run_folder(path: str) -> Path:
    """The run that a user means: its folder, or its name under experiments/."""
    for folder in (Path(path), Path("experiments") / path):
        if (folder / "checkpoints").is_dir():
            return folder
    raise UserError(f"{path} is no run: it has no checkpoints folder", "Give a run's folder (experiments/NAME).")


def backup_folder(run: Path) -> Path | None:
    """Where the run's configuration says that its backups go."""
    try:
        settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
        return Path(str(settings["backup_dir"])) / str(settings["experiment_name"]) if settings["backup_dir"] else None
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _places(run: Path) -> list[tuple[str, Path]]:
    backups = backup_folder(run)
    return [("checkpoint", run / "checkpoints")] + ([("backup", backups)] if backups is not None else [])


def _found(run: Path) -> list[tuple[str, Path]]:
    return [(place, path) for place, folder in _places(run) for path in format.list_checkpoints(folder)]


def print_checkpoints(path: str) -> int:
    """Print every checkpoint and backup of a run, newest first."""
    run = run_folder(path)
    found = _found(run)
    if not found:
        print(f"{run} has no checkpoints yet")
        return 0
    print(f"{'step':>10}  {'place':<10}  {'size':>10}  {'written':<16}  notes")
    for place, checkpoint in found:
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        written = datetime.fromtimestamp(checkpoint.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        step = format.step_of(checkpoint)
        print(f"{step:>10}  {place:<10}  {size / 2**20:>7.1f} MB  {written:<16}  {', '.join(_notes(checkpoint, step))}")
    return 0


def _notes(checkpoint: Path, step: int) -> list[str]:
    notes = ["best"] if retention.best_step(checkpoint.parent) == step else []
    try:
        progress, trainer = format.read_trainer_state(checkpoint)
    except (OSError, ValueError, TypeError):
        return [*notes, "trainer.json cannot be read"]
    if progress.best_loss is not None and progress.best_step == step:
        notes.append(f"eval loss {progress.best_loss:.4f}")
    notes.append(f"ZeRO-{progress.zero_stage}, {progress.world} process(es)")
    if "emergency" in trainer:
        notes.append(f"emergency: {trainer['emergency']}")
    return notes


def verify(path: str) -> int:
    """Read every file of every checkpoint and backup against its hash; 1 when one is damaged."""
    damaged = 0
    for place, checkpoint in _found(run_folder(path)):
        wrong = integrity.integrity_error(checkpoint)
        damaged += wrong is not None
        print(f"{place} {checkpoint.name}: {'DAMAGED: ' + wrong if wrong is not None else 'whole'}")
    return 1 if damaged else 0


def prune(path: str, last: int, every: int | None, backups: bool, dry_run: bool) -> int:
    """Remove all but the newest `last` checkpoints (or backups), the best one, and every `every`th step."""
    if last < 1:
        raise UserError(f"--keep-last {last} would remove every checkpoint", "Keep at least one.")
    places = dict(_places(run_folder(path)))
    folder = places.get("backup" if backups else "checkpoint")
    if folder is None:
        raise UserError(f"{path} has no backup_dir", "Its config.yaml says where backups go.")
    keep = retention.Retention(last, every)
    found = format.list_checkpoints(folder)
    kept = keep.kept([format.step_of(checkpoint) for checkpoint in found], retention.best_step(folder))
    removed = [checkpoint for checkpoint in found if format.step_of(checkpoint) not in kept]
    if removed and all(
        integrity.integrity_error(checkpoint) is not None for checkpoint in found if checkpoint not in removed
    ):
        raise UserError("none of the checkpoints that would stay is whole", f"See lumina checkpoints verify {path}.")
    for checkpoint in removed:
        print(f"{'would remove' if dry_run else 'removed'} {checkpoint}")
    if not dry_run:
        retention.prune(folder, keep)
    print(f"{len(found) - len(removed)} kept")
    return 0


def restore(path: str, step: int | None, source: str | None) -> int:
    """Copy a backup (the newest whole one, or that of `step`) back among the run's checkpoints."""
    run = run_folder(path)
    folder = Path(source) if source is not None else backup_folder(run)
    if folder is None:
        raise UserError(f"{run}/config.yaml names no backup_dir", "Give the folder with --from.")
    choices = [c for c in format.list_checkpoints(folder) if step is None or format.step_of(c) == step]
    chosen = integrity.latest_valid(choices)
    if chosen is None:
        wanted = "" if step is None else f" of step {step}"
        raise UserError(f"no whole backup{wanted} in {folder}", f"lumina checkpoints list {path} shows what there is.")
    final = run / "checkpoints" / chosen.name
    if final.is_dir() and integrity.integrity_error(final) is None:
        print(f"{final} is there and whole: nothing to restore")
        return 0
    partial = final.with_name(f".{chosen.name}.restored-{secrets.token_hex(4)}.partial")
    shutil.copytree(chosen, partial)
    for file in partial.iterdir():
        fsync(file)
    wrong = integrity.integrity_error(partial)
    if wrong is not None:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"the copy of {chosen} is damaged: {wrong}", "Is the disk full? Nothing was changed.")
    fsync(partial)
    if final.is_dir():
        retention.discard(final)
    os.replace(partial, final)
    fsync(final.parent)
    print(f"restored {final} from {chosen}")
    newer = [c.name for c in format.list_checkpoints(final.parent) if format.step_of(c) > format.step_of(final)]
    if newer:
        print(f"--resume auto would take the newer {newer[0]}; to go on from this one: --resume {final}")
    return 0


def save(path: str, timeout: float) -> int:
    """Ask the job that is training this run, wherever it runs, for a checkpoint now, and wait for the answer."""
    run = run_folder(path)
    folder = run / REQUESTS
    folder.mkdir(exist_ok=True)
    request = f"save-{secrets.token_hex(6)}"
    asked, answered = folder / f"{request}.json", folder / f"{request}.answer.json"
    write_json(asked, {"time": time.time()})
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if answered.exists():
                answer = json.loads(answered.read_text())
                if answer["error"]:
                    print(f"step {answer['step']} could not be saved: {answer['error']}")
                    return 1
                print(f"saved {answer['path']}")
                return 0
            time.sleep(0.1)
    finally:
        taken = not asked.exists()
        for file in (asked, answered):
            file.unlink(missing_ok=True)
    raise UserError(
        f"no checkpoint in {timeout:.0f} s: " + ("the job is still saving" if taken else "nothing trains this run now"),
        "A job looks for requests at each step; --timeout SECONDS waits longer for long steps.",
    )
