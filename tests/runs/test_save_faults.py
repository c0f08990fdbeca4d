"""Trouble with the disk delays or fails a save, never the run: the older checkpoints stay whole and health says so."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tests.runs as real
from lumina import checkpoint
from lumina.checkpoint import write
from lumina.monitor import read_metrics
from lumina.monitor.events import read_events
from lumina.train import loop
from lumina.train import step as step_module
from lumina.train.saving import saves
from tests.runs import Job, Runs, arguments

pytestmark = pytest.mark.timeout(900)

SETTINGS: dict[str, Any] = {"precision": "fp32", "save_every_n_batches": 3, "batch_size": 2, "global_batch_size": 4}


def rules(run: Path) -> list[str]:
    return [event["rule"] for event in read_events(run / "events.jsonl")]


def names(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run / "checkpoints")]


def _slow(rank: int, *, metrics: Path) -> None:
    """The save of step 3 hangs until step 8 has been trained."""
    original = write.fsync

    def fsync(path: Path) -> None:
        while checkpoint.name_of(3) in str(path) and not any(r["step"] >= 8 for r in read_metrics(metrics)):
            time.sleep(0.02)
        original(path)

    write.fsync = fsync


def test_a_slow_disk_puts_saves_off(runs: Runs, conversations: Path, place: Path) -> None:
    """Steps go on while one save is written; the one due at step 6 begins when the writer is free. A backup that is due
    at the last step is made."""
    run, disk = place / "run", place / "disk"
    # Steps take milliseconds, and the writer is to be free before the last of them on a busy machine too.
    settings = {**SETTINGS, "max_steps": 40, "keep_last": 40, "backup_dir": disk, "backup_every_n_batches": 40}
    slow = partial(_slow, metrics=run / "metrics.jsonl")
    job = runs.start(arguments(run, conversations, stage=2, **settings), 2, slow)
    assert job.wait() == [0, 0], job.stderr()
    assert 6 not in names(run)
    assert {3, 40} < set(names(run))
    assert [path.name for path in checkpoint.list_checkpoints(disk / "run")] == [checkpoint.name_of(40)]
    assert all(checkpoint.integrity_error(path) is None for path in checkpoint.list_checkpoints(run / "checkpoints"))


def _writer_dies(rank: int) -> None:
    """The first save's thread ends by an exception that no code foresaw."""
    original, tried = write.fsync, []

    def fails_once(path: Path) -> None:
        if not tried and rank == 1:
            tried.append(path)
            raise MemoryError("planted in the writer")
        original(path)

    write.fsync = fails_once


def test_a_writer_that_dies(runs: Runs, conversations: Path, place: Path) -> None:
    run = place / "run"
    argv = arguments(run, conversations, stage=2, max_steps=9, **SETTINGS)
    job = runs.start([*argv, "--set", "save_async=false"], 2, _writer_dies)
    assert job.wait() == [0, 0], job.stderr()
    assert 3 not in names(run)
    assert names(run)[0] == 9
    assert "WARN(save-failed: checkpoint of step 3: rank 1 could not write its file)" in job.stdout()
    assert rules(run).count("save-failed") == 3  # the failure; the episode's beginning and end
    assert not list((run / "checkpoints").glob(".*"))


# --- Signals --------------------------------------------------------------------------------------


def _stop_in(rank: int, *, phase: str) -> None:
    """SIGTERM to this very process when it first reaches a phase of step 4."""

    def before(module: Any, name: str, when: Any) -> None:
        original, sent = getattr(module, name), []

        def stopping(*given: Any, **named: Any) -> Any:
            if not sent and when(*given):
                sent.append(1)
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*given, **named)

        setattr(module, name, stopping)

    if rank != 0:
        return
    at_step = lambda run, *rest: run.state.step == 3
    if phase == "compute":
        before(step_module, "accumulate", at_step)
    elif phase == "update":
        before(step_module, "update", at_step)
    elif phase == "evaluation":
        before(loop, "evaluate", lambda *given: True)
    elif phase == "saving":
        before(saves.Saves, "_begin", lambda *given: True)
    else:
        before(write, "fsync", lambda *given: True)


@pytest.mark.parametrize(
    ("phase", "world"),
    [
        pytest.param("update", 2, marks=pytest.mark.long),
        ("evaluation", 1),
        ("saving", 2),
        *(pytest.param(phase, 1, marks=pytest.mark.long) for phase in ("compute", "writing")),
    ],
)
def test_sigterm_in_each_phase(phase: str, world: int, runs: Runs, conversations: Path, place: Path) -> None:
    run = place / "run"
    settings = {**SETTINGS, "max_steps": 9, "eval_every_n_batches": 4, "eval_fraction": 0.2}
    argv = arguments(run, conversations, stage=2, **settings)
    job = runs.start(argv, world, partial(_stop_in, phase=phase))
    assert job.wait() == [75] * world, job.stderr()
    stopped = real.steps(run)[-1]["step"]
    assert stopped < 9
    assert names(run)[0] == stopped
    assert checkpoint.integrity_error(real.newest(run)) is None
    runs.train([*argv, "--resume", "auto"], world)
    assert names(run)[0] == 9


def test_a_place_that_takes_no_checkpoint_is_refused_before_the_first_step(
    runs: Runs, conversations: Path, place: Path
) -> None:
    """It was found out at the first save, which may be hours later."""
    run = place / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to("/proc")  # nobody makes a file there
    said = runs.refusal(arguments(run, conversations, stage=1, max_steps=1, **SETTINGS))
    assert f"error: no checkpoint can be written to {run}/checkpoints: " in said
    assert "choose another --output-dir" in said
    assert [path.name for path in run.iterdir() if not path.name.startswith(".owner")] == ["checkpoints"]


def test_a_place_that_takes_no_backup_is_refused_before_the_first_step(
    runs: Runs, conversations: Path, place: Path
) -> None:
    """Nor is anything made for the run."""
    (place / "disk").touch()
    backups = {"backup_dir": place / "disk", "backup_every_n_batches": 1}
    said = runs.refusal(arguments(place / "run", conversations, stage=1, max_steps=1, **SETTINGS, **backups))
    assert f"error: no backup can be written to {place}/disk/run: Not a directory" in said
    assert not (place / "run").exists()


@pytest.mark.long  # what is refused when, and what is said, is what tests/train/saving/test_places.py holds
def test_a_run_goes_on_while_its_backups_are_away(runs: Runs, conversations: Path, place: Path) -> None:
    run, disk = place / "run", place / "disk"
    steady = {"lr_scheduler": "constant", "warmup_ratio": 0, "backup_dir": disk, "backup_every_n_batches": 1}
    line = arguments(run, conversations, stage=1, **SETTINGS, **steady)
    assert f"WARNING: backup_dir {disk} is on the file system" in runs.train([*line, "--set", "max_steps=2"]).stdout()
    assert checkpoint.name_of(2) in [path.name for path in checkpoint.list_checkpoints(disk / "run")]
    disk.rename(place / "away")
    disk.touch()
    job = runs.train([*line, "--set", "max_steps=4", "--resume", "auto"])
    assert f"WARNING: no backup can be written to {disk}/run at present: Not a directory" in job.stdout()
    assert names(run)[0] == 4
    assert "backup-failed" in rules(run)


# --- Real file systems ----------------------------------------------------------------------------


@pytest.fixture
def tmpfs(place: Path) -> Iterator[Path]:
    """A file system of 128 MB of its own: three checkpoints of the tiny model (38 MB each) fit, a fourth does not."""
    folder = place / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def link_checkpoints(run: Path, disk: Path) -> None:
    """Only the checkpoints are on the small disk."""
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)


def until(done: Any, job: Job) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert all(rank.is_alive() for rank in job.ranks), job.stderr()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.cluster
def test_a_full_disk(runs: Runs, conversations: Path, place: Path, tmpfs: Path) -> None:
    """The run goes on with the checkpoints it has; when there is room again, it saves again."""
    run = place / "run"
    link_checkpoints(run, tmpfs)
    ballast = tmpfs / "ballast"
    ballast.write_bytes(bytes(60 * 2**20))
    # In the whole vocabulary a checkpoint has 38 MB: beside the ballast there is room for one.
    settings = {**SETTINGS, "max_steps": 100_000, "learning_rate": 1e-5, "whole_vocabulary": True}
    job = runs.start(arguments(run, conversations, stage=2, **settings), 2)
    until(lambda: "save-failed" in rules(run), job)
    (failure, *_) = [e for e in read_events(run / "events.jsonl") if e["rule"] == "save-failed"]
    assert "could not write its file" in failure["reason"] or "No space left" in failure["reason"]
    kept = names(run)
    assert kept
    assert checkpoint.integrity_error(real.newest(run)) is None
    ballast.unlink()
    until(lambda: names(run)[0] > kept[0], job)
    job.signal(signal.SIGTERM)
    assert job.wait() == [75, 75], job.stderr()
    assert "WARN(save-failed" in job.stdout()
    assert checkpoint.integrity_error(real.newest(run)) is None


@pytest.mark.cluster
def test_a_read_only_disk(runs: Runs, conversations: Path, place: Path, tmpfs: Path) -> None:
    """Not tried again and again; the last save of the run fails, and so does the run, plainly."""
    run = place / "run"
    link_checkpoints(run, tmpfs)
    argv = arguments(run, conversations, stage=1, max_steps=12, **SETTINGS)
    told = place / "read-only"
    job = runs.start([*argv, "--set", "save_async=false"], patch=partial(real.held_until, 3, told))
    until(lambda: names(run), job)
    # While a file is written there the disk is busy: the next step waits for this one.
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    told.touch()
    kept = names(run)
    assert job.wait() == [1]
    assert "Traceback" not in job.stderr()
    assert "could not be written; the newest one is older" in job.stderr()
    assert names(run) == kept
    assert checkpoint.integrity_error(real.newest(run)) is None
    failures = [e for e in read_events(run / "events.jsonl") if e["rule"] == "save-failed" and e["kind"] == "save"]
    assert all("not tried again" in e["action"] for e in failures)
    assert real.steps(run)[-1]["step"] == 12
