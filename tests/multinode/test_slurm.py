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


@pytest.mark.timeout(1800)
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
        until(lambda n=number: log.read_text().count("The checkpoint is saved") == n, 30, "nothing was saved")
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


# A step that asked for all of the job's --gpus on its one node would never begin.
@pytest.mark.parametrize("option", ["--gpus-per-node=2", "--gpus=4"])
def test_a_rank_on_each_gpu(slurm: Cluster, place: Path, option: str) -> None:
    """Two nodes of two GPUs each; the ranks are a script without torch."""
    log, script = place / "slurm.log", place / "says.py"
    script.write_text("import os, socket; print('SAYS', socket.gethostname(), *map(os.environ.get, "
                      "('RANK', 'WORLD_SIZE', 'SLURM_GPUS_ON_NODE')), flush=True)")  # fmt: skip
    line = ["sbatch", "--parsable", "--output", str(log), "--nodes=2", option, "launchers/train.sbatch", str(script)]
    wait_for(slurm, slurm.run("head", line).stdout.strip(), "COMPLETED", log)
    said = sorted(line for line in log.read_text().splitlines() if line.startswith("SAYS "))
    assert said == [f"SAYS n{rank // 2} {rank} 4 2" for rank in range(4)]
    assert "idle" not in log.read_text()


def test_a_shell_of_salloc_knows_its_gpus_and_a_heterogeneous_one_is_refused(slurm: Cluster) -> None:
    launch = ["lumina", "launch", "--dry-run", "--", "train", "--config", "nano"]
    for options in (["--gres=gpu:2"], ["--gpus-per-node=2"], ["--ntasks=4", "--gpus-per-task=1"]):
        shown = slurm.run("head", ["salloc", "--nodes=2", *options, *launch]).stdout
        assert "n0: ranks 0-1" in shown, shown
        assert "n1: ranks 2-3" in shown, shown
    shown = slurm.run("head", ["salloc", "--nodes=2", "--ntasks=3", *launch]).stdout
    assert "n0: ranks 0-1" in shown, shown
    assert "n1: rank 2\n" in shown, shown
    shown = slurm.run("head", ["salloc", "--nodes=2", "--gres=gpu:2", "--ntasks-per-node=1", *launch]).stdout
    assert "WARNING: 2 of this job's 4 GPUs will be idle" in shown, shown
    done = slurm.run("head", ["salloc", "--nodes=1", ":", "--nodes=1", *launch], 120)
    assert (done.returncode, "a heterogeneous job of 2 components" in done.stdout) == (2, True), done.stdout


SAYS = """
from lumina.cluster import launched
from lumina.config.visible import device_of, visible_names
launcher, rank, world, local_rank, local_world, _ = launched()
names = visible_names() or []
device = device_of(local_rank, local_world, len(names)) if names else None
print("SAYS", launcher, rank, world, local_rank, local_world, names, device, flush=True)
"""


# Slurm sets it where it knows the GPUs' driver, which plain files have not.
OWN_GPU = ["sh", "-c", 'CUDA_VISIBLE_DEVICES=$SLURM_LOCALID exec "$@"', "sh"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # Each rank is shown its own GPU alone, which is number 0 of one.
        (["--gres=gpu:2", "--nodes=2", "--ntasks=3", "srun", "--ntasks=3", "--gpus-per-task=1", *OWN_GPU],
         ["Slurm 0 3 0 2 ['0'] 0", "Slurm 1 3 1 2 ['1'] 0", "Slurm 2 3 0 1 ['0'] 0"]),
        # The tasks of a heterogeneous job's components are one world.
        (["--ntasks=2", ":", "--ntasks=1", "srun", "--het-group=0,1"],
         ["Slurm 0 3 0 2 [] None", "Slurm 1 3 1 2 [] None", "Slurm 2 3 0 1 [] None"]),
    ],
    ids=["gpus-per-task", "het-group"],
)  # fmt: skip
def test_a_plain_step_knows_its_ranks(slurm: Cluster, words: list[str], said: list[str]) -> None:
    shown = slurm.run("head", ["salloc", *words, "python", "-P", "-c", SAYS], 120).stdout
    lines = [line.partition(" ")[2] for line in shown.splitlines() if line.startswith("SAYS ")]
    assert sorted(lines) == said, shown
