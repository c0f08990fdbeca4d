"""Callbacks in whole runs on two processes: what one rank's callback asks for, or does, is every rank's."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable as Function
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lumina.train
from lumina import checkpoint
from lumina.monitor import read_metrics, read_run
from lumina.train import Callback, Context, StepResult
from tests.runs import Runs, arguments, differing, final, newest, steps

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

STEPS = 9
SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 2,
    "global_batch_size": 4,
    "max_steps": STEPS,
    "save_every_n_batches": 100,
    "emergency_seconds": 3,
}


class Asking(Callback):
    """Logs, has step 2 or one of the next saved, and asks to stop after step 4."""

    def after_step(self, context: Context, result: StepResult) -> None:
        context.log("loss of mine", result.loss)
        if result.step == 2:
            context.request_checkpoint()
        if result.step == 4:
            context.stop("four are enough")

    def at_save(self, context: Context, path: Path) -> None:
        print(f"saved {path.name} on rank {context.rank}", file=sys.stderr)


class Raising(Callback):
    def before_step(self, context: Context) -> None:
        if context.step == 3:
            raise LookupError("planted")


class Changing(Callback):
    """Finds the model, which nobody gave it, and halves its weights."""

    def after_step(self, context: Context, result: StepResult) -> None:
        from lumina.model import Transformer

        if result.step == 4:
            for found in gc.get_objects():
                if isinstance(found, Transformer):
                    for parameter in found.parameters():
                        parameter.data.mul_(0.5)


def _given(rank: int, *, kinds: dict[int, Function[[], Callback]]) -> None:
    """In a rank's process: train with the callbacks of this rank."""
    own = [kinds[rank]()] if rank in kinds else []
    lumina.train.train_rank = lambda config: lumina.train.train(config, callbacks=own).exit_code


def test_one_rank_asks_and_the_run_is_the_one_without(runs: Runs, conversations: Path, place: Path) -> None:
    """Rank 1 alone asks to stop; then rank 0 alone logs. Resumed, the run ends in the weights of one
    that had none (law 6)."""
    run, whole = place / "run", place / "whole"
    argv = arguments(run, conversations, stage=2, **SETTINGS)
    job = runs.start(argv, 2, partial(_given, kinds={1: Asking}))
    assert job.wait() == [0, 0], job.stderr()
    stopped = steps(run)[-1]["step"]
    assert 4 < stopped <= 7
    assert f"Stopped at step {stopped}: four are enough" in job.stdout()
    assert newest(run).name == checkpoint.name_of(stopped)
    assert len(checkpoint.list_checkpoints(run / "checkpoints")) == 2, "the one that was asked for, and the last"
    end = read_run(run)["starts"][0]["end"]
    assert (end["state"], end["reason"]) == ("stopped", "four are enough")

    job = runs.start([*argv, "--resume", "auto"], 2, partial(_given, kinds={0: Asking}))
    assert job.wait() == [0, 0], job.stderr()
    logged = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "callback"]
    by_step = {record["step"]: record["loss"] for record in steps(run)}
    assert {record["step"]: record["loss of mine"] for record in logged} == {
        step: loss for step, loss in by_step.items() if step > stopped
    }
    assert f"saved {checkpoint.name_of(STEPS)} on rank 0" in job.stderr()

    runs.train(arguments(whole, conversations, stage=2, **SETTINGS), 2)
    assert differing(final(run, STEPS), final(whole, STEPS)) == []


def test_an_exception_on_one_rank_ends_the_run_on_all_saved(runs: Runs, conversations: Path, place: Path) -> None:
    run, whole = place / "run", place / "whole"
    argv = arguments(run, conversations, stage=1, **SETTINGS)
    job = runs.start(argv, 2, partial(_given, kinds={1: Raising}))
    assert job.wait() == [2, 2], job.stderr()
    for log in job.logs:
        assert "rank 1: Raising.before_step raised LookupError: planted" in Path(f"{log}.err").read_text()
    saved = newest(run)
    assert checkpoint.integrity_error(saved) is None
    assert 3 < checkpoint.step_of(saved) < STEPS
    runs.train([*argv, "--resume", "auto"], 2)
    runs.train(arguments(whole, conversations, stage=1, **SETTINGS), 2)
    assert differing(final(run, STEPS), final(whole, STEPS)) == []


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.long)])
def test_changed_weights_end_the_run_unsaved(stage: int, runs: Runs, conversations: Path, place: Path) -> None:
    run = place / "run"
    argv = arguments(run, conversations, stage=stage, **{**SETTINGS, "save_every_n_batches": 3})
    job = runs.start(argv, 2, partial(_given, kinds={0: Changing, 1: Changing}))
    assert job.wait() == [2, 2], job.stderr()
    assert "the callback Changing.after_step changed weights" in job.stderr()
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")] == [checkpoint.name_of(3)]
