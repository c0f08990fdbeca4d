"""Nodes that die, are cut off or stop, and come back: the run goes on without them and takes them in again."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina import checkpoint
from lumina.monitor import read_metrics
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
from tests.runs import Runs, arguments, newest, steps


@pytest.mark.timeout(1800)
def test_lost_nodes_are_done_without_and_taken_in_again(
    cluster: Cluster, runs: Runs, conversations: Path, place: Path
) -> None:
    run = place / "run"
    words = arguments(run, conversations, stage=2, max_steps=100_000, eval_data=f"[{conversations}]", **SETTINGS)
    words += ["--set", "eval_every_n_batches=100000"]
    job = launch(cluster, words, "--min-nodes", "1", PAUSE="0.3")
    failures = (
        (cluster.kill, cluster.revive),
        (cluster.cut, cluster.join),
        (cluster.stop, cluster.resume),
    )
    for lose, bring_back in failures:
        starts = len(worlds(run))
        began_at = at(run)
        until(
            alive_and(job, lambda n=began_at: at(run) >= n + SAVE_EVERY + 2 and worlds(run)[-1:] == [2]),
            180,
            "slow start",
        )
        lose("n1")
        lost_at = at(run)
        until(alive_and(job, lambda n=starts: len(worlds(run)) > n and worlds(run)[-1] == 1), 60, "no world of one")
        until(alive_and(job, lambda: at(run) > 0), 60, "no step in a world of one")
        resumed = [line for line in (run / "train.log").read_text().splitlines() if "resumed at step" in line][-1]
        assert int(resumed.rpartition(" ")[2]) > lost_at - SAVE_EVERY - 1
        bring_back("n1")
        until(
            alive_and(job, lambda n=starts: len(worlds(run)) > n + 1 and worlds(run)[-1] == 2), 180, "no world of two"
        )
    last = at(run)
    until(alive_and(job, lambda: at(run) > last + 2), 60, "no step after the last return")
    cluster.run("head", ["pkill", "-TERM", "-f", "lumina launch"])
    assert job.wait(60) == 75, job.output()[-5000:]
    expect_nobody(cluster)
    expect_every_sample(run, conversations)

    end = checkpoint.read_trainer_state(newest(run))[0].step + 1
    runs.train([*words, "--set", f"max_steps={end}", "--resume", "auto"])
    calm = place / "calm"
    calm_words = [word.replace(str(run.name), calm.name) if word == run.name else word for word in words]
    runs.train([*calm_words, "--set", f"max_steps={end}"])
    evaluated = [
        [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval"][-1] for folder in (run, calm)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-3)
    assert [r["samples"] for r in steps(run)] == [r["samples"] for r in steps(calm)]
