"""A rank that raises, is out of memory, crashes or hangs: the launch says who, where and why, and leaves nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.multinode.cluster import Cluster
from tests.multinode.elastic import SETTINGS, expect_nobody, launch
from tests.runs import arguments

REPORT = re.compile(r"First failure: rank (\d+) on (\w+) \(local rank 0, pid \d+\): (.*)")


@pytest.mark.parametrize(
    ("kind", "rank", "cause"),
    [
        ("raise", 1, "RuntimeError: a planted exception"),
        ("oom", 0, "killed by the kernel for want of memory"),
        ("segv", 1, "ended by SIGSEGV"),
        ("hang", 0, "hung: rank 0: no progress for"),
        ("hang", 1, "hung: rank 1: no progress for"),
    ],
)
def test_the_launch_names_the_first_failure_and_leaves_nothing(
    kind: str, rank: int, cause: str, cluster: Cluster, conversations: Path, place: Path
) -> None:
    patience = 5 if kind == "hang" else 120
    words = arguments(place / "run", conversations, stage=2, max_steps=1000, hang_timeout=patience, **SETTINGS)
    group = cluster.memory_group(1 << 30) if kind == "oom" else place
    job = launch(cluster, words, "--max-restarts", "0", FAULT=f"{kind}:{rank}:3", OOM_GROUP=str(group), PAUSE="0.05")
    assert job.wait(120) == 1, job.output()
    found = REPORT.search(job.output())
    assert found, job.output()[-4000:]
    assert (int(found[1]), found[2]) == (rank, f"n{rank}"), job.output()[-4000:]
    assert cause in found[3], found[0]
    if kind == "hang":  # both ranks' stacks, and the collective in which the other one waited
        assert f"WATCHDOG rank {rank}" in job.output()
        assert "time.sleep(10_000)" in job.output()
    expect_nobody(cluster)


def test_a_hang_is_restarted_at_once(cluster: Cluster, conversations: Path, place: Path) -> None:
    words = arguments(place / "run", conversations, stage=2, max_steps=8, hang_timeout=5, **SETTINGS)
    job = launch(cluster, words, "--max-restarts", "1", FAULT="hang:1:7", PAUSE="0.05")
    assert job.wait(150) == 0, job.output()[-4000:]
    assert "failure 1 of at most 1: rank 1 on n1" in job.output()
    expect_nobody(cluster)


def test_a_users_mistake_is_not_tried_again(cluster: Cluster, place: Path) -> None:
    job = launch(cluster, arguments(place / "run", place / "missing.jsonl", stage=2, **SETTINGS))
    assert job.wait(90) == 2
    assert "missing.jsonl" in job.output()
    assert "failure 1 of" not in job.output()
    expect_nobody(cluster)
