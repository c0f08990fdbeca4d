"""Ranks of two nodes share rows: a lost node leaves one rank to each row, a returning one brings the sharing back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.multinode.cluster import Cluster, until
from tests.multinode.elastic import (
    SAVE_EVERY,
    SETTINGS,
    alive_and,
    at,
    expect_every_sample,
    expect_nobody,
    launch,
    worlds,
)
from tests.runs import Runs, arguments, losses, steps

STEPS = 60


def shared(run: Path) -> list[int]:
    """How many ranks shared a row, in each start of the run that is in its log."""
    starts = (run / "train.log").read_text().split(" process(es),")[1:]
    found = [re.search(r"sequence parallelism: (\d+) neighbouring ranks .* across nodes", start) for start in starts]
    return [int(one[1]) if one else 1 for one in found]


@pytest.mark.long  # three starts across nodes and a second run: two minutes
@pytest.mark.timeout(1800)
def test_rows_shared_by_two_nodes_of_which_one_is_lost(
    cluster: Cluster, runs: Runs, conversations: Path, place: Path
) -> None:
    run = place / "run"
    settings = SETTINGS | {"num_heads": 4, "num_kv_heads": 1, "hidden_size": 64, "seq_length": 160}
    words = arguments(run, conversations, stage=2, max_steps=STEPS, **settings)
    job = launch(cluster, [*words, "--sequence-parallel", "2"], "--min-nodes", "1", PAUSE="0.5")
    until(alive_and(job, lambda: at(run) >= SAVE_EVERY + 2), 180, "slow start")
    cluster.kill("n1")
    until(alive_and(job, lambda: worlds(run) == [2, 1] and shared(run) == [2, 1]), 60, "no start without the lost node")
    until(alive_and(job, lambda: steps(run)[-1]["step"] > SAVE_EVERY + 3), 60, "no step without it")
    cluster.revive("n1")
    until(alive_and(job, lambda: worlds(run) == [2, 1, 2]), 120, "the node was not taken in again")
    assert job.wait(180) == 0, job.output()[-5000:]
    assert shared(run) == [2, 1, 2]
    assert "sequence_parallel_size 2 does not divide the 1 processes that are left: 1 for now" in job.output()
    expect_nobody(cluster)
    expect_every_sample(run, conversations)

    alone = place / "alone"
    runs.train(arguments(alone, conversations, stage=2, max_steps=STEPS, **settings))
    for name in ("samples", "tokens", "lr"):
        assert [one[name] for one in steps(run)] == [one[name] for one in steps(alone)], name
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
