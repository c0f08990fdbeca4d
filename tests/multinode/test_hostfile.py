"""The plain command lines of the README: DeepSpeed's launcher with a hostfile under every ZeRO stage, and MPI."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.multinode.cluster import BIN, Cluster
from tests.multinode.elastic import SETTINGS as COMMON
from tests.multinode.elastic import launch
from tests.runs import DEEPSPEED, ROOT, Runs, arguments, losses, steps

pytestmark = pytest.mark.timeout(1200)  # the first offload on a machine compiles DeepSpeed's CPUAdam

STEPS = 8
SETTINGS = {**COMMON, "max_steps": STEPS, "save_every_n_batches": 1000}


def deepspeed(hostfile: str | Path, *words: str) -> list[str]:
    return [str(DEEPSPEED), "--hostfile", str(hostfile), "launchers/train.py", *words]


@pytest.mark.parametrize(
    ("precision", "tolerance"), [pytest.param("bf16", 2e-3, marks=pytest.mark.long), ("fp32", 1e-5)]
)
def test_every_stage_ends_in_the_same_losses(
    precision: str, tolerance: float, cluster: Cluster, conversations: Path, place: Path
) -> None:
    """hostfile.example: two ranks on localhost."""
    settings, curves = {**SETTINGS, "precision": precision}, {}
    for stage in ("2", "0", "1", "3", "3_offload"):
        folder = place / f"zero{stage}"
        words = arguments(folder, conversations, stage=stage, **settings)
        line = deepspeed(ROOT / "hostfile.example", *words)
        if stage == "0":  # the same by the module's name, whose local rank comes before the command
            line[-len(words) - 1 : -len(words)] = ["--module", "lumina", "train"]
        done = cluster.run("n0", line, patience=600)
        assert done.returncode == 0, done.stdout[-3000:]
        assert [record["step"] for record in steps(folder)] == list(range(1, STEPS + 1))
        assert f"ZeRO-{stage[0]}, 2 process(es)" in done.stdout
        curves[stage] = losses(folder)
    assert curves["2"][-1] < curves["2"][0]  # it learns
    for stage, curve in curves.items():
        assert curve == pytest.approx(curves["2"], abs=tolerance, rel=0), stage


def test_every_launcher_gives_the_curve_of_a_single_process(
    cluster: Cluster, runs: Runs, conversations: Path, place: Path
) -> None:
    """Two nodes through DeepSpeed's launcher (pdsh) and through ours (ssh, pdsh), and two ranks of mpirun."""
    words = lambda name: arguments(place / name, conversations, stage=2, **SETTINGS)
    runs.train(words("alone"))
    alone = losses(place / "alone")
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    done = {
        "deepspeed": cluster.run("n0", deepspeed(cluster.hostfile(), *words("deepspeed"))),
        "mpirun": cluster.run("n0", [*mpirun, "python", "launchers/train.py", *words("mpirun")]),
    }
    for transport in ("ssh", "pdsh"):
        job = launch(cluster, words(transport), "--transport", transport)
        assert job.wait(120) == 0, job.output()[-3000:]
    for name, ended in done.items():
        assert ended.returncode == 0, f"{name}:\n{ended.stdout[-3000:]}"
    for name in ("deepspeed", "mpirun", "ssh", "pdsh"):
        assert "2 process(es)" in (place / name / "train.log").read_text(), name
        assert losses(place / name) == pytest.approx(alone, abs=1e-5, rel=0), name


@pytest.mark.skipif(shutil.which("tcsh") is None, reason="needs tcsh")
def test_a_node_whose_login_shell_is_tcsh(cluster: Cluster, place: Path) -> None:
    accounts = place / "passwd"
    accounts.write_text(re.sub(r"(?m)^(root:.*:).*$", r"\g<1>/bin/tcsh", Path("/etc/passwd").read_text()))
    (place / "says.py").write_text("import os; print('SAYS', os.environ['RANK'], os.environ['LUMINA_X'], flush=True)\n")
    assert cluster.run("n1", ["mount", "--bind", str(accounts), "/etc/passwd"]).returncode == 0
    try:
        assert "tcsh" in cluster.run("head", ["ssh", "n1", "echo $version"]).stdout  # a variable of tcsh's own
        line = [str(BIN / "lumina"), "launch", "--hostfile", cluster.hostfile(), "--", str(place / "says.py")]
        done = cluster.run("head", line, 120, LUMINA_X="it's $HOME")
    finally:
        cluster.run("n1", ["umount", "/etc/passwd"])
    assert done.returncode == 0, done.stdout
    assert sorted(line for line in done.stdout.splitlines() if "SAYS" in line) == [
        f"SAYS {rank} it's $HOME" for rank in range(2)
    ]


def test_a_failing_rank_fails_the_launch(cluster: Cluster, place: Path) -> None:
    words = arguments(place / "run", place / "missing.jsonl", stage=2, **SETTINGS)
    done = cluster.run("n0", deepspeed(cluster.hostfile(), *words))
    assert done.returncode != 0
    assert "missing.jsonl" in done.stdout
    assert "lumina/train" not in done.stdout, "a traceback for a user's mistake"
