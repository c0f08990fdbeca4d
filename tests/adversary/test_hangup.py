"""Whoever reads what a run prints goes away: the terminal is closed, the ssh connection is lost, `tee` ends.

Each line is how, and how the run must end: no step is lost, and what cannot be printed any more kills nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest

from lumina import checkpoint
from tests.runs import DEEPSPEED, PATIENCE, ROOT, Runs, arguments, clean_environment, newest, steps

STEPS = 120


def on_a_terminal(terminal: str, ignored: bool, rank: int) -> None:
    """This process leads a session whose terminal it is, as under a shell that is closed; ignored: as under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)  # the tests may be under nohup too
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(descriptor, number)


def into_a_pipe(pipe: Path, rank: int) -> None:
    descriptor = os.open(pipe, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(descriptor, number)


# What goes away, the exit code, and whether every step is to be taken.
ATTACKS = [("a terminal", 75, False), ("a terminal under nohup", 0, True), ("the reader of a pipe", 0, True)]


@pytest.mark.parametrize(("gone", "code", "finished"), ATTACKS, ids=[attack[0] for attack in ATTACKS])
def test_a_run_outlives_its_readers(
    gone: str, code: int, finished: bool, runs: Runs, conversations: Path, place: Path
) -> None:
    steps = STEPS if finished else 100 * STEPS  # far more than are taken before it stops, on a busy machine too
    settings = {"precision": "fp32", "save_every_n_batches": 1_000_000, "epochs": 10_000}
    words = arguments(place / "run", conversations, max_steps=steps, **settings)
    if gone == "the reader of a pipe":
        os.mkfifo(place / "pipe")
        job = runs.start(words, patch=partial(into_a_pipe, place / "pipe"))
        reader = os.open(place / "pipe", os.O_RDONLY)
    else:
        reader, terminal = os.openpty()
        job = runs.start(words, patch=partial(on_a_terminal, os.ttyname(terminal), gone.endswith("nohup")))
    os.set_blocking(reader, False)
    while job.step() < 2:
        assert job.ranks[0].is_alive(), "it ended"
        try:
            os.read(reader, 1 << 16)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(reader)  # of a terminal: its last, and the kernel sends SIGHUP
    assert job.wait() == [code]
    assert job.step() == steps if finished else 2 <= job.step() < steps
    saved = newest(place / "run")
    assert saved.name == checkpoint.name_of(job.step()), "75 and 0: a checkpoint of the last step is there"
    assert checkpoint.integrity_error(saved) is None


LAUNCHERS = {
    "lumina launch": ([sys.executable, "-P", "-m", "lumina", "launch", "--hostfile", "hosts", "--", "train"], 75),
    # It dies of the signal itself: what its ranks leave is what counts.
    "deepspeed": ([str(DEEPSPEED), "--num_gpus", "2", str(ROOT / "launchers" / "train.py")], -signal.SIGHUP),
}


@pytest.mark.long  # two real launchers with two ranks each
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_terminal_of_a_launcher_is_closed(launcher: str, conversations: Path, place: Path) -> None:
    """Whoever writes to it afterwards gets EIO. The run is saved at the step that it ends at."""
    run, (words, code) = place / "run", LAUNCHERS[launcher]
    (place / "hosts").write_text("localhost slots=2\n")
    settings = {"precision": "fp32", "save_every_n_batches": 1_000_000, "epochs": 100_000, "max_steps": 100_000}
    reader, terminal = os.openpty()
    process = subprocess.Popen(
        [*words, *arguments(run, conversations, **settings)],
        cwd=place,
        env={**clean_environment(), "PYTHONPATH": str(ROOT)},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=partial(_lead, terminal),
    )
    os.close(terminal)
    os.set_blocking(reader, False)
    deadline, said = time.monotonic() + PATIENCE, b""
    while not (run / "metrics.jsonl").exists() or len(steps(run)) < 2:
        assert process.poll() is None, said.decode(errors="replace")[-3000:]
        assert time.monotonic() < deadline
        try:
            said += os.read(reader, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(reader)
    assert process.wait(PATIENCE) == code
    while "end" not in (start := json.loads((run / "run.json").read_text())["starts"][-1]):
        assert time.monotonic() < deadline + PATIENCE
        time.sleep(0.1)
    assert start["end"]["state"] == "stopped"
    saved = newest(run)
    assert saved.name == checkpoint.name_of(start["end"]["step"])
    assert checkpoint.integrity_error(saved) is None


def _lead(terminal: int) -> None:
    """In the new process, which leads a session: its terminal. Not under nohup, as the tests may be."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
