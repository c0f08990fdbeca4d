"""Ctrl-C: answered at once, saved at the next step; pressed again, the run ends and says what is lost."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import tests.runs as real
from tests.runs import Runs, arguments

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

SETTINGS = {
    "precision": "fp32",
    "batch_size": 2,
    "max_steps": 100_000,  # far more than are taken before a signal
    "epochs": 100_000,
    "save_every_n_batches": 3,
    "lr_scheduler": "constant",
    "warmup_ratio": 0,
}


def _slow_fifth_step(begun: Path, rank: int) -> None:
    """In a rank's process: the fifth step takes for ever; the file `begun` says that it has begun."""
    from lumina.train import loop

    plain = loop.take_step

    def slow(run: loop.Run, data: object) -> object:
        if run.state.step == 4:
            begun.touch()
            time.sleep(800.0)
        return plain(run, data)

    loop.take_step = slow


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_the_first_press_saves_and_says_how_to_go_on(runs: Runs, conversations: Path, place: Path) -> None:
    run = place / "run"
    job = runs.start(arguments(run, conversations, **SETTINGS))
    job.wait_for_step(4)
    job.signal(signal.SIGINT)
    assert job.wait() == [75]
    said = job.stdout()
    assert (
        "SIGINT: the step at work is ended and saved, then the run ends. Press Ctrl-C again to leave at once: " in said
    )
    stopped = real.steps(run)[-1]["step"]
    assert f"Stopped at step {stopped}: signal SIGINT. The checkpoint is saved." in said
    (command,) = re.findall(r"To go on: lumina (train --resume \S+)", said)
    finished = runs.train([*command.split()[1:], "--set", f"max_steps={stopped + 1}"])
    assert f"goes on from {run}/checkpoints/step-{stopped:08d}, step {stopped}" in finished.stdout()


def test_the_second_press_says_what_is_lost(runs: Runs, conversations: Path, place: Path) -> None:
    run = place / "run"
    job = runs.start(arguments(run, conversations, **SETTINGS), patch=partial(_slow_fifth_step, place / "begun"))
    job.wait_for_step(3)
    _until((place / "begun").exists, "the fifth step begins")
    job.signal(signal.SIGINT)
    _until(lambda: "Press Ctrl-C again" in job.stdout(), "the first press is answered while the step goes on")
    job.signal(signal.SIGINT)
    assert job.wait() == [130]
    assert "Interrupted at step 4 without saving: 1 step since the checkpoint of step 3 are lost." in job.stdout()
    assert "Traceback" not in job.stderr()


def test_a_finished_run_sums_up(runs: Runs, conversations: Path, place: Path) -> None:
    run = place / "run"
    more = {**SETTINGS, "max_steps": 3, "eval_fraction": 0.2, "eval_every_n_batches": 2}
    said = runs.train(arguments(run, conversations, **more)).stdout()
    tokens = sum(record["tokens"] for record in real.steps(run))
    assert re.search(
        rf"Finished: 3 steps in 0:\d\d:\d\d, {tokens:,} tokens, best evaluation \d+\.\d+ at step [23]", said
    )
    assert f"next: lumina chat {run}" in said
    again = runs.train([*arguments(run, conversations, **more), "--resume", "auto"]).stdout()
    assert "Nothing is left to train: the run is complete at step 3." in again
