"""Two starts of one run, signals at odd moments, suspended processes: real runs that must lose and double no work."""

from __future__ import annotations

import errno
import json
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lumina import checkpoint
from lumina.checkpoint import write
from lumina.checkpoint.lock import NAME
from lumina.cli import main
from lumina.files import write_json
from tests.runs import PATIENCE, Job, Runs, arguments, newest

pytestmark = pytest.mark.timeout(900)

SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 2,
    "global_batch_size": 4,
    "max_steps": 100_000,
    "epochs": 100_000,  # the run is still there when it is looked at
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def signal_all(job: Job, number: signal.Signals) -> None:
    for rank in range(len(job.ranks)):
        job.signal(number, rank)


def test_two_starts_of_one_run(runs: Runs, conversations: Path, place: Path) -> None:
    """Before the first checkpoint: the second start is refused while the first lives. A start that lost the lock all
    the same, because its machine was suspended, ends on every rank and writes nothing more."""
    run = place / "run"
    argv = arguments(run, conversations, stage=2, save_every_n_batches=10**6, **SETTINGS)
    first = runs.start(argv, 2)
    first.wait_for_step(2)

    refused = runs.refusal(argv)
    assert f"process {first.ranks[0].pid} on " in refused
    assert "owns the run" in refused
    assert "since " in refused
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 1
    assert all(rank.is_alive() for rank in first.ranks)

    signal_all(first, signal.SIGSTOP)
    write_json(run / NAME, {"token": "0a", "job": "other", "pid": 17, "host": "far", "since": 0})
    before = contents(run)
    signal_all(first, signal.SIGCONT)
    assert first.wait() == [2, 2], first.stderr()
    after = contents(run)
    del before[next(name for name in before if name.startswith(".owner-"))]  # its own heartbeat, removed at its end
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] != before[name]] == []
    assert "error: another start (process 17 on far, since " in first.stderr()
    assert "Traceback" not in first.stderr()
    assert checkpoint.list_checkpoints(run / "checkpoints") == []


def _disk_is_read_only(rank: int) -> None:
    """Every save fails, in a way that trying again does not help."""

    def fsync(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    write.fsync = fsync


def test_the_recorded_state_is_what_the_exit_code_says(
    runs: Runs, conversations: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "run"
    job = runs.start(arguments(run, conversations, **{**SETTINGS, "max_steps": 2}), patch=_disk_is_read_only)
    assert job.wait() == [1], job.stderr()
    end = json.loads((run / "run.json").read_text())["starts"][-1]["end"]
    assert (end["state"], end["step"]) == ("failed", 2)
    assert "the checkpoint of step 2 could not be written" in end["reason"]
    assert main(["runs", str(place)]) == 0
    assert "failed" in capsys.readouterr().out


def _asked_at_the_last_moment(rank: int, *, request: Path) -> None:
    """Somebody asks for a checkpoint, and the run fails before it looks for requests again."""
    from lumina.train import loop

    take_step = loop.take_step

    def fail(run: Any, data: Any) -> Any:
        if run.state.step < 2:
            return take_step(run, data)
        for folder in ("asked", "answered"):
            (request.parents[1] / folder).mkdir(parents=True)
        request.write_text("{}")
        raise RuntimeError("a planted exception")

    loop.take_step = fail


def test_who_asks_a_run_that_fails_for_a_checkpoint_is_told(runs: Runs, conversations: Path, place: Path) -> None:
    requests = place / "run" / "requests"
    argv = arguments(place / "run", conversations, emergency_checkpoint="false", **SETTINGS)
    job = runs.start(argv, patch=partial(_asked_at_the_last_moment, request=requests / "asked" / "0a.json"))
    assert job.wait() == [1], job.stderr()
    reply = json.loads((requests / "answered" / "0a.json").read_text())
    assert (reply["step"], reply["error"]) == (2, "the run ended at step 2 before it was saved")
    assert list((requests / "asked").iterdir()) == []


def _prepares_for_ever(rank: int, *, begun: Path) -> None:
    """Rank 0 prepares the data for an hour; the others wait for it."""
    from lumina.train import build

    def slow(*given: Any) -> Any:
        begun.touch()
        time.sleep(3600)

    if rank == 0:
        build.open_data = slow


def _stop_while_preparing(runs: Runs, argv: list[str], world: int, begun: Path) -> tuple[Job, list[int]]:
    """SIGTERM to every rank while the data is prepared."""
    job = runs.start(argv, world, partial(_prepares_for_ever, begun=begun))
    deadline = time.monotonic() + PATIENCE
    while not begun.exists():
        assert time.monotonic() < deadline
        assert all(rank.is_alive() for rank in job.ranks), job.stderr()
        time.sleep(0.02)
    signal_all(job, signal.SIGTERM)
    return job, job.wait()


def test_sigterm_while_data_is_prepared(runs: Runs, conversations: Path, place: Path) -> None:
    """At once, without a first step. 75 means that there is a checkpoint to go on from, always: so none where none
    is."""
    run = place / "run"
    argv = arguments(run, conversations, stage=2, **{**SETTINGS, "max_steps": 1})
    job, codes = _stop_while_preparing(runs, argv, 2, place / "first")
    assert codes == [-signal.SIGTERM] * 2, job.stderr()
    assert "Traceback" not in job.stderr()
    assert not run.exists()

    runs.train(argv)
    before = contents(run)
    job, codes = _stop_while_preparing(runs, [*argv, "--resume", "auto"], 1, place / "second")
    assert codes == [75], job.stderr()
    assert "Traceback" not in job.stderr()
    assert contents(run) == before
    assert checkpoint.step_of(newest(run)) == 1
