"""A run resumed on other numbers of ranks, and under other ZeRO stages, is the run that nothing interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lumina.cluster.signals import EXIT_STOPPED
from tests.runs import Runs, arguments, losses, steps

SETTINGS: dict[str, Any] = {
    "seq_length": 32,
    "precision": "fp32",
    "batch_size": 1,
    "global_batch_size": 6,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_steps": 16,
    "save_every_n_batches": 1000,
}
TOTAL = 16


def watch(groups: Path, last: int, rank: int) -> None:
    """In a rank's process: write the groups to a file once the checkpoint is loaded, and ask the run to stop
    after step `last`."""
    from lumina.train import build
    from lumina.train.liveness.stragglers import Stragglers

    resume, compare = build.load_resumed, Stragglers.compare

    def noted(start: Any, ranks: Any, engine: Any, progress: Any) -> None:
        resume(start, ranks, engine, progress)
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        groups.with_suffix(f".{rank}").write_text(json.dumps(decays))

    def stopping(self: Stragglers, step: int) -> Any:
        if step == last - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compare(self, step)

    build.load_resumed, Stragglers.compare = noted, stopping  # type: ignore[method-assign]


def train(runs: Runs, run: Path, data: Path, world: int, stage: int, last: int, groups: Path) -> None:
    """Train up to step `last` of a run of TOTAL steps."""
    words = arguments(run, data, stage=stage, resume="auto", **SETTINGS)
    job = runs.start(words, world, patch=partial(watch, groups, last if last < TOTAL else 0))
    assert job.wait() == [EXIT_STOPPED if last < TOTAL else 0] * world, job.stderr()


@pytest.fixture(scope="module")
def calm(runs: Runs, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank that nothing interrupted."""
    run = tmp_path_factory.mktemp("calm") / "run"
    runs.train(arguments(run, conversations, stage=1, **SETTINGS))
    return run


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param([(2, 1), (1, 1), (3, 1), (2, 1)], id="2-1-3-2 ranks under ZeRO-1", marks=pytest.mark.long),
        pytest.param([(2, 2), (1, 2), (3, 2), (2, 2)], id="2-1-3-2 ranks under ZeRO-2", marks=pytest.mark.long),
        pytest.param([(2, 3), (1, 3), (3, 3), (2, 3)], id="2-1-3-2 ranks under ZeRO-3"),
        pytest.param([(2, 3), (2, 1), (2, 0), (2, 0)], id="ZeRO-3 to 1 to 0", marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(600)
def test_a_resized_run_goes_on(
    plan: list[tuple[int, int]], calm: Path, runs: Runs, conversations: Path, place: Path
) -> None:
    run = place / "run"
    for number, (world, stage) in enumerate(plan, 1):
        train(runs, run, conversations, world, stage, TOTAL * number // len(plan), groups := place / f"groups-{number}")
        if number > 1:  # the first start resumes nothing
            found = [json.loads(groups.with_suffix(f".{rank}").read_text()) for rank in range(world)]
            assert found == [[0.1, 0.0]] * world
    log = (run / "train.log").read_text()
    starts = [line for line in log.splitlines() if re.search(r"ZeRO-\d, \d+ process", line)]
    found = [tuple(map(int, re.findall(r"ZeRO-(\d), (\d+) process", line)[0])) for line in starts]
    assert found == [(stage, world) for world, stage in plan]
    assert all("resumed at step" in line for line in starts[1:])
    assert [record["step"] for record in steps(run)] == list(range(1, TOTAL + 1))
    assert losses(run) == pytest.approx(losses(calm), abs=1e-4, rel=0)
    assert [record["samples"] for record in steps(run)] == [record["samples"] for record in steps(calm)]
    assert [record["lr"] for record in steps(run)] == [record["lr"] for record in steps(calm)]
