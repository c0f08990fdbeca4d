"""torchrun: a rank that fails is started again by it, and the run goes on where it was; a start by hand is refused. On
two nodes by the command of docs/cluster.md: a node that lost its agent joins again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multinode.cluster import BIN, Cluster, Job, until
from tests.multinode.elastic import RANK, SAVE_EVERY, SETTINGS, alive_and, at, expect_every_sample, worlds
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


def agent(cluster: Cluster, node: str, store: str, words: list[str]) -> Job:
    """torchrun on one of two nodes, as docs/cluster.md has it; `store`: the node that keeps the rendezvous."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{store}:29400", "--max-restarts", "3"]
    line = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", *meeting, str(RANK), *words]
    return cluster.start(node, line, PAUSE="0.5", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


@pytest.mark.long  # two starts across nodes: a minute each
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("store", "lost"), [("n0", "n1"), ("n1", "n0")], ids=["beside rank 0", "with rank 0"])
def test_a_node_that_lost_its_agent_joins_the_run_again(
    store: str, lost: str, cluster: Cluster, conversations: Path, place: Path
) -> None:
    """Without --resume: the agent that stayed makes it the same launch."""
    run = place / "run"
    words = ["train", *arguments(run, conversations, stage=2, max_steps=40, **SETTINGS)]
    stays, goes = (agent(cluster, node, store, words) for node in (store, lost))
    until(alive_and(stays, lambda: at(run) >= SAVE_EVERY + 2), 180, lambda: stays.output()[-3000:])
    cluster.kill(lost)
    goes.wait(20)
    lost_at = at(run)
    cluster.revive(lost)
    again = agent(cluster, lost, store, words)
    until(alive_and(stays, lambda: len(worlds(run)) == 2), 180, lambda: stays.output()[-3000:] + again.output()[-3000:])
    assert [job.wait(120) for job in (stays, again)] == [0, 0], stays.output()[-3000:] + again.output()[-3000:]
    assert worlds(run) == [2, 2]
    resumed = [line for line in (run / "train.log").read_text().splitlines() if "resumed at step" in line]
    assert int(resumed[-1].rpartition(" ")[2]) > lost_at - SAVE_EVERY - 1
    expect_every_sample(run, conversations)
