"""Waiting for a rank that prepares: longer than the process group's timeout, not for one that is gone."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Runs, arguments, steps

TIMEOUT, PREPARING = 8, 13  # seconds; a collective that began with the preparing would have ended with an error
SAY_AFTER = 3.0  # seconds: rank 0 waits for less than PREPARING, by what its own preparing takes


def prepare(what: str, slow: int, rank: int) -> None:
    """`slow` prepares the data for long, or ends instead."""
    import torch.distributed as dist

    from lumina.train.agreement import store
    from lumina.train.objectives import sft

    original, join = sft.prepare_splits, dist.init_process_group

    def impatient(*words: Any, **named: Any) -> None:
        join(*words, **{**named, "timeout": timedelta(seconds=TIMEOUT)})

    def prepared(*words: Any, **named: Any) -> Any:
        if rank == slow and what == "waits":
            time.sleep(PREPARING)
        elif rank == slow and what == "raises":
            raise RuntimeError("a planted exception")
        elif rank == slow:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*words, **named)

    sft.prepare_splits = prepared
    if what == "waits":
        dist.init_process_group = impatient
        store._SAY_AFTER = SAY_AFTER


def reads(error: Exception, rank: int) -> None:
    """Rank 0 meets `error` in the run's folder."""
    from lumina import checkpoint

    def raise_error(folder: Path, launch: str | None) -> None:
        raise error

    checkpoint.refuse_owned = raise_error


def killed_at_once(rank: int) -> None:
    """Rank 1, before its first heartbeat; how long that may take is shortened."""
    from lumina.train import run
    from lumina.train.agreement import store

    store._NEVER_SEEN = 2.0
    if rank == 1:
        run.heartbeats = lambda ranks: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_preparing_may_take_longer_than_a_collective(runs: Runs, conversations: Path, place: Path) -> None:
    """And it is said for whom, and for what."""
    words = arguments(place / "run", conversations, max_steps=1, precision="fp32", cache_dir=place / "cache")
    job = runs.start(words, 2, partial(prepare, "waits", 1), machines=True)
    assert job.wait() == [0, 0], job.stderr()
    assert [record["step"] for record in steps(place / "run")] == [1]
    assert f"rank 0 waits for rank 1 on {os.uname().nodename}: preparing the data (" in job.stderr()


HOST = os.uname().nodename
# What happens, the ranks' exit codes, the ranks that have a traceback, and what the others say in one line.
ENDS: dict[str, tuple[Callable[[int], None], list[int], set[int], str]] = {
    "rank 1 raises": (
        partial(prepare, "raises", 1),
        [1, 1],
        {1},
        f"error: rank 1 on {HOST} has ended (preparing the data): RuntimeError: a planted exception",
    ),
    "rank 0 raises": (
        partial(prepare, "raises", 0),
        [1, 1],
        {0},
        f"error: rank 0 on {HOST} has ended: RuntimeError: a planted exception",
    ),
    "rank 0 raises in a decision": (
        partial(reads, RuntimeError("a planted exception")),
        [1, 1],
        {0},
        f"error: rank 0 on {HOST} has ended: RuntimeError: a planted exception",
    ),
    "a disk fails rank 0": (
        partial(reads, OSError(errno.EACCES, "Permission denied", "/far/run")),
        [2, 2],
        set(),
        f"error: /far/run: Permission denied (rank 0 on {HOST})\n  Change its permissions",
    ),
    "a connection of rank 0's ends": (
        partial(reads, TimeoutError("timed out")),
        [1, 1],
        {0},
        f"error: rank 0 on {HOST} has ended: TimeoutError: timed out",
    ),
    "rank 1 is killed at once": (killed_at_once, [1, -signal.SIGKILL], set(), "rank 1 sends no heartbeat for 2 s"),
}


_LONG = {"rank 0 raises in a decision", "a connection of rank 0's ends"}  # told as what it raises in its preparing


@pytest.mark.parametrize("end", [pytest.param(end, marks=[pytest.mark.long] if end in _LONG else []) for end in ENDS])
def test_a_rank_that_ends_is_not_waited_for(end: str, runs: Runs, conversations: Path, place: Path) -> None:
    """The others say in a line what it met, and where, and end as it did where a user or a disk is the cause."""
    patch, codes, with_traceback, says = ENDS[end]
    words = arguments(place / "run", conversations, max_steps=1, precision="fp32", cache_dir=place / "cache")
    job = runs.start(words, 2, patch, machines=True)
    assert job.wait() == codes, job.stderr()
    texts = {rank: log.with_suffix(".err").read_text() for rank, log in enumerate(job.logs)}
    assert {rank for rank, text in texts.items() if "Traceback" in text} == with_traceback
    for rank, text in texts.items():
        if rank not in with_traceback and codes[rank] > 0:
            assert says in text


def test_a_log_that_cannot_be_opened_ends_every_rank(runs: Runs, conversations: Path, place: Path) -> None:
    """Rank 0 alone opens it, outside of what else the ranks agree on: the others waited in their first step."""
    (place / "run" / "train.log").mkdir(parents=True)
    words = arguments(place / "run", conversations, max_steps=1, precision="fp32", cache_dir=place / "cache")
    job = runs.start(words, 2, machines=True)
    assert job.wait() == [2, 2], job.stderr()
    assert "Traceback" not in job.stderr()
    for log in job.logs:
        assert f"error: rank 0 on {HOST}: " in log.with_suffix(".err").read_text()


@pytest.mark.long  # a minute without a heartbeat
def test_a_rank_that_is_killed_is_not_waited_for(runs: Runs, conversations: Path, place: Path) -> None:
    words = arguments(place / "run", conversations, max_steps=1, precision="fp32", cache_dir=place / "cache")
    job = runs.start(words, 2, partial(prepare, "is killed", 1), machines=True)
    assert job.wait() == [1, -signal.SIGKILL], job.stderr()
    assert f"error: rank 1 on {HOST} sends no heartbeat for 60 s (preparing the data)" in job.stderr()
    assert "Traceback" not in job.stderr()
