"""Slurm: the same run through sbatch; warnings, cancelling, requeueing, and a signal to a single rank."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.multinode.cluster import BIN, SLURM_NEEDS, Cluster, missing, until
from tests.multinode.elastic import RANK, SETTINGS, at, expect_every_sample, expect_nobody, worlds
from tests.runs import Runs, arguments, losses, steps

pytestmark = pytest.mark.skipif(
    bool(missing(SLURM_NEEDS)), reason=f"needs {missing(SLURM_NEEDS)}: apt install slurm-wlm munge"
)
STEPS = 24
REQUEUED = 200.0  # seconds for a start after a requeue: the old one's end, and a loaded machine


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head with slurmctld and two nodes with slurmd."""
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as started:
        started.start_slurm()
        yield started


def sbatch(cluster: Cluster, words: list[str], log: Path, *options: str, pause: float = 0.0) -> str:
    """Submit launchers/train.sbatch with the tests' rank script; returns the job's number."""
    line = [
        "sbatch",
        "--parsable",
        "--output",
        str(log),
        *options,
        "launchers/train.sbatch",
        str(RANK),
        "train",
        *words,
    ]
    done = cluster.run("head", line, PAUSE=str(pause), LUMINA_LAUNCH="--export PAUSE")
    assert done.returncode == 0, done.stdout
    return done.stdout.strip().splitlines()[-1]


def start_soon(cluster: Cluster, job: str) -> None:
    """Slurm lets a requeued job wait for two minutes, and a new start in the second of its end is refused: "Job
    credential revoked". Three seconds will do."""
    shown = facts(cluster, job)
    if shown.get("JobState") != "PENDING" or shown["StartTime"] == "Unknown":
        return
    if datetime.fromisoformat(shown["StartTime"]) - datetime.now() > timedelta(seconds=5):
        cluster.run("head", ["scontrol", "update", f"JobId={job}", "StartTime=now+3"])


def facts(cluster: Cluster, job: str) -> dict[str, str]:
    """What scontrol shows of a job."""
    shown = cluster.run("head", ["scontrol", "-o", "show", "job", job]).stdout
    return {name: value for name, _, value in (word.partition("=") for word in shown.split())}


def state(cluster: Cluster, job: str) -> str:
    return facts(cluster, job).get("JobState", "")


def story(cluster: Cluster, job: str, log: Path) -> str:
    """What Slurm says of the job and the nodes, and the end of its log."""
    said = [
        cluster.run("head", words).stdout for words in (["scontrol", "-o", "show", "job", job], ["sinfo", "-N", "-l"])
    ]
    return "\n".join([*said, log.read_text()[-4000:]])


def wait_for(cluster: Cluster, job: str, wanted: str, log: Path, patience: float = 120) -> None:
    until(
        lambda: state(cluster, job) == wanted,
        patience,
        lambda: story(cluster, job, log),
    )


@pytest.mark.timeout(900)
def test_every_way_of_stopping_saves_requeues_and_finishes(
    slurm: Cluster, runs: Runs, conversations: Path, place: Path
) -> None:
    calm = place / "calm"
    runs.train(arguments(calm, conversations, stage=2, max_steps=STEPS, **SETTINGS))
    run, log = place / "run", place / "slurm.log"
    words = arguments(run, conversations, stage=2, max_steps=STEPS, **SETTINGS)
    job = sbatch(slurm, words, log, pause=0.5)
    ways = (
        ["scancel", "--signal=USR1", job],
        ["scontrol", "requeue", job],
        ["ssh", "n1", "pkill -TERM -f '^[^ ]*python [^ ]*rank.py train'"],
    )
    for number, way in enumerate(ways, 1):
        before = at(run)

        def trains(number: int = number, before: int = before) -> bool:
            start_soon(slurm, job)
            return len(worlds(run)) == number and at(run) > before + 1

        until(trains, REQUEUED, lambda: story(slurm, job, log))
        slurm.run("head", way)
        until(lambda n=number: log.read_text().count("The checkpoint is saved") == n, 30, "nothing was saved in 30 s")
    until(lambda: start_soon(slurm, job) or at(run) == STEPS, REQUEUED, lambda: story(slurm, job, log))
    wait_for(slurm, job, "COMPLETED", log)
    assert worlds(run) == [2, 2, 2, 2]
    resumed = [line for line in (run / "train.log").read_text().splitlines() if "process(es)" in line]
    assert all("resumed at step" in line for line in resumed[1:])
    assert losses(run) == pytest.approx(losses(calm), abs=1e-5)
    assert len(steps(run)) == STEPS
    expect_every_sample(run, conversations)
    expect_nobody(slurm)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Cluster, conversations: Path, place: Path) -> None:
    run, log = place / "run", place / "slurm.log"
    job = sbatch(slurm, arguments(run, conversations, stage=2, max_steps=500, **SETTINGS), log, pause=0.5)
    until(lambda: at(run) > 2, 90, "does not train")
    slurm.run("head", ["scancel", job])
    wait_for(slurm, job, "CANCELLED", log, 60)
    until(lambda: not slurm.processes("n0", "lumina") and not slurm.processes("n1", "lumina"), 40, "ranks are left")
    assert "The checkpoint is saved" in log.read_text()


def test_a_failing_rank_fails_the_job(slurm: Cluster, place: Path) -> None:
    log = place / "slurm.log"
    job = sbatch(slurm, arguments(place / "run", place / "missing.jsonl", stage=2, **SETTINGS), log)
    wait_for(slurm, job, "FAILED", log)
    assert "missing.jsonl" in log.read_text()
    assert BIN.is_dir()
