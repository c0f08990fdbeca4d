"""Ten failures in one run, of five kinds, at moments drawn from a seed, in the middle of saves too."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.multinode.cluster import Cluster, until
from tests.multinode.elastic import SETTINGS, alive_and, at, expect_every_sample, expect_nobody, launch, worlds
from tests.runs import Runs, arguments, losses, steps

SEED, FAILURES, STEPS = 20, 10, 60


def strike(kind: str, cluster: Cluster, rng: random.Random) -> None:
    """One failure. What it takes away comes back."""
    node = rng.choice(["n0", "n1"])
    if kind == "kill":
        cluster.kill(node)
        time.sleep(rng.uniform(0, 3))
        cluster.revive(node)
    elif kind == "cut":
        cluster.cut(node)
        time.sleep(rng.uniform(13, 15))
        cluster.join(node)
    elif kind == "stop":
        cluster.stop(node)
        time.sleep(rng.uniform(2, 14))
        cluster.resume(node)
    else:  # one rank alone
        for pid in cluster.processes(node, "rank.py train")[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(1800)
def test_the_run_completes_with_the_samples_of_the_undisturbed_one(
    cluster: Cluster, runs: Runs, conversations: Path, place: Path
) -> None:
    rng = random.Random(SEED)
    kinds = ["rank"] * 4 + ["kill"] * 3 + ["stop"] * 2 + ["cut"]
    assert len(kinds) == FAILURES
    rng.shuffle(kinds)
    run = place / "run"
    settings = {**SETTINGS, "max_steps": STEPS, "save_every_n_batches": 2}  # half of the steps save
    words = arguments(run, conversations, stage=1, **settings)
    job = launch(cluster, words, "--min-nodes", "1", "--max-restarts", "30", PAUSE="0.6")
    for kind in kinds:
        before, starts = at(run), len(worlds(run))
        until(alive_and(job, lambda b=before: at(run) > b), 120, lambda: job.output()[-3000:])
        time.sleep(rng.uniform(0, 1.5))
        strike(kind, cluster, rng)
        if kind != "stop":  # a short stop does no harm
            until(alive_and(job, lambda s=starts: len(worlds(run)) > s), 120, lambda: job.output()[-3000:])
    assert job.wait(240) == 0, job.output()[-3000:]
    expect_nobody(cluster)
    assert at(run) == STEPS
    expect_every_sample(run, conversations)
    calm = place / "calm"
    runs.train(arguments(calm, conversations, stage=1, **settings))
    assert [record["samples"] for record in steps(run)] == [record["samples"] for record in steps(calm)]
    assert losses(run)[-1] == pytest.approx(losses(calm)[-1], abs=1e-3)
