"""Which checkpoints a path means that a user gives to a command, without reading them. Loads no torch.

A path is a run's folder or its name under experiments/ (its best checkpoint, or the newest when none was evaluated),
RUN/best, or one checkpoint.
"""

from __future__ import annotations

import logging
from pathlib import Path

from lumina.checkpoint.format import list_checkpoints, name_of
from lumina.checkpoint.integrity import candidates
from lumina.checkpoint.retention import best_step
from lumina.config import UserError

log = logging.getLogger("lumina")

RUNS = Path("experiments")
_EARLY_BEST = "best_model.pt"  # `--resume checkpoints/best_model.pt`, as the early README has it
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


def run_path(given: str | Path) -> Path:
    """The path itself, or experiments/GIVEN where only that is there."""
    path = Path(given)
    return RUNS / path if not path.exists() and not path.is_absolute() and (RUNS / path).exists() else path


def model_choices(path: str | Path) -> list[Path]:
    """The checkpoints whose model a path means, best choice first; the others stand in for one that is damaged.

    Raises:
        UserError: nothing there, or a file in a format that is not read.
    """
    given = run_path(path)
    if given.name == _EARLY_BEST and not given.exists():
        run = _newest_run()
        if run is None:
            raise UserError(f"{given} does not exist, and no run under {RUNS}/ has a checkpoint", "Train one first.")
        log.info("%s does not exist: using the best checkpoint of the newest run, %s", given, run)
        given = run
    if given.is_file():
        why = " and a pickle can run code when it is opened" if given.suffix in _PICKLES else ""
        raise UserError(
            f"{given} is a file: a checkpoint is a folder of safetensors{why}",
            "Give a run's folder (experiments/NAME) or one of its checkpoints/step-… folders.",
        )
    wants_best = given.name == "best" and not given.exists()
    run = run_path(given.parent) if wants_best else given
    choices = candidates(run)
    if choices[0] != run:  # a run's folder or its checkpoints folder
        best = best_step(choices[0].parent)
        if best is not None:
            choices = sorted(choices, key=lambda choice: choice.name != name_of(best))
        elif wants_best:
            log.warning("no checkpoint of %s was evaluated: using its newest", run)
    return choices


def _newest_run() -> Path | None:
    """The run whose newest checkpoint was written last."""
    newest = {run: found[0] for run in RUNS.glob("*") if (found := list_checkpoints(run / "checkpoints"))}
    return max(newest, key=lambda run: newest[run].stat().st_mtime, default=None)
