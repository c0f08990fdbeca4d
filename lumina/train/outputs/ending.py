"""What a run says when it is asked to stop, when it is interrupted and at its end: what is lost, where things are, and
the command that comes next."""

from __future__ import annotations

import shlex
from datetime import timedelta
from pathlib import Path

from lumina.cluster import launch_command


def resuming_command(folder: Path, world: int) -> str:
    """How the run is gone on with: where there are several ranks, by the launcher's command line, if this machine has
    it."""
    if world > 1:
        command = launch_command()
        if command is None:
            return "the same command with --resume auto"
        resumes = any(word == "--resume" or word.startswith("--resume=") for word in command)
        return shlex.join([*command, *([] if resumes else ["--resume", "auto"])])
    return f"lumina train --resume {shlex.quote(str(folder))}"


def unsaved(step: int, saved: int) -> str:
    """The steps that a checkpoint does not hold, for people."""
    count = step - saved
    since = f"since the checkpoint of step {saved}" if saved else "since the beginning"
    return f"{count} step{'' if count == 1 else 's'} {since}"


def stopping(signal: str, step: int, saved: int) -> str:
    """Said at once when a signal asks the run to stop."""
    again = f" Press Ctrl-C again to leave at once: {unsaved(step, saved)} are lost." if signal == "SIGINT" else ""
    passes = " Passes of the next step that have begun are taken again when the run goes on."
    return f"{signal}: the step at work is ended and saved, then the run ends.{again}{passes}"


def interrupted(folder: Path, world: int, step: int, saved: int) -> str:
    """Said when the second Ctrl-C ended the run without a save."""
    lost = f"{unsaved(step, saved)} are lost" if step > saved else "nothing is lost"
    then = f" To go on: {resuming_command(folder, world)}" if saved else " No checkpoint was written."
    return f"Interrupted at step {step} without saving: {lost}.{then}"


def summary(
    folder: Path, step: int, best: tuple[float, int] | None, seconds: float, taken: int, tokens: int
) -> list[str]:
    """The lines at the end of a finished run. `best`: evaluation loss and its step; `taken`, `tokens`: steps of this
    start and the tokens in them."""
    this_start = f" ({taken:,} of them in this start)" if taken != step else ""
    evaluated = f"best evaluation {best[0]:.4f} at step {best[1]:,}" if best is not None else "not evaluated"
    run = shlex.quote(str(folder))
    return [
        f"Finished: {step:,} steps{this_start} in {timedelta(seconds=round(seconds))}, {tokens:,} tokens, {evaluated}",
        f"  in {folder}: checkpoints/, metrics.jsonl, train.log, config.yaml",
        f"  next: lumina chat {run} | lumina serve {run} | lumina report {run}",
    ]
