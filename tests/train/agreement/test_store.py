"""Waiting for a rank that prepares: longer than the process group's timeout, not for one that is gone."""

from __future__ import annotations

import os
import signal
import time
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


@pytest.mark.long
def test_preparing_may_take_longer_than_a_collective(runs: Runs, conversations: Path, place: Path) -> None:
    """And it is said for whom, and for what."""
    words = arguments(place / "run", conversations, max_steps=1, precision="fp32", cache_dir=place / "cache")
    job = runs.start(words, 2, partial(prepare, "waits", 1), machines=True)
    assert job.wait() == [0, 0], job.stderr()
    assert [record["step"] for record in steps(place / "run")] == [1]
    assert f"rank 0 waits for rank 1 on {os.uname().nodename}: preparing the data (" in job.stderr()


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("raises", 1),
        # A minute without a heartbeat.
        pytest.param("is killed", -signal.SIGKILL, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_is_gone_is_not_waited_for(
    what: str, code: int, runs: Runs, conversations: Path, place: Path
) -> None:
    words = arguments(place / "run", conversations, max_steps=1, precision="fp32", cache_dir=place / "cache")
    job = runs.start(words, 2, partial(prepare, what, 1), machines=True)
    assert job.wait() == [1, code], job.stderr()
    told = "has ended (preparing the data): RuntimeError: a planted exception"
    assert f"rank 1 on {os.uname().nodename} " in job.stderr()
    assert (told if what == "raises" else "sends no heartbeat for 60 s (preparing the data)") in job.stderr()
