"""torchrun: a rank that fails is started again by it, and the run goes on where it was; a start by hand is refused."""

from __future__ import annotations

from pathlib import Path

from tests.multinode.cluster import BIN, Cluster
from tests.multinode.elastic import RANK, SETTINGS, worlds
from tests.runs import arguments, steps


def test_a_restart_by_the_same_torchrun_goes_on(cluster: Cluster, conversations: Path, place: Path) -> None:
    words = ["train", *arguments(place / "run", conversations, stage=2, max_steps=10, **SETTINGS)]
    line = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "1", "--max-restarts", "1", str(RANK), *words]
    # Once: the second start has fewer steps to take.
    done = cluster.run("n0", line, patience=200, FAULT="raise:0:8")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "a planted exception" in done.stdout
    assert worlds(place / "run") == [1, 1]
    assert [record["step"] for record in steps(place / "run")] == list(range(1, 11))
    again = cluster.run("n0", line, patience=200)
    assert again.returncode != 0, "another torchrun is another launch"
    assert "already holds checkpoints" in again.stdout
