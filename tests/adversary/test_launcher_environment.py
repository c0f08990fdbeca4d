"""Launchers' variables that are missing, no numbers, or contradict each other: one message, exit code 2, and no torch.

Each line: the environment of `lumina train`, and what it must say.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.cli import main
from tests.runs import clean_environment

ATTACKS = [
    ("RANK=0", "RANK=0 is set and WORLD_SIZE is not"),
    ("RANK=0 MASTER_ADDR=n0 LOCAL_RANK=0", "RANK=0 is set and WORLD_SIZE is not"),
    ("WORLD_SIZE=2", "WORLD_SIZE=2 is set and RANK is not"),
    ("WORLD_SIZE=two", "WORLD_SIZE=two is set and RANK is not"),
    ("LOCAL_RANK=1", "LOCAL_RANK=1 is set and RANK is not"),
    ("RANK=x WORLD_SIZE=2", "RANK is 'x', which is no whole number"),
    ("RANK= WORLD_SIZE=2", "RANK is '', which is no whole number"),
    ("RANK=-1 WORLD_SIZE=2", "RANK is '-1', which is no whole number"),
    ("RANK=² WORLD_SIZE=2", "RANK is '²', which is no whole number"),
    (f"RANK={'9' * 5000} WORLD_SIZE=2", "which is no whole number"),
    ("RANK=0 WORLD_SIZE=1.5", "WORLD_SIZE is '1.5', which is no whole number"),
    ("RANK=0 WORLD_SIZE=0", "RANK=0 with WORLD_SIZE=0"),
    ("RANK=2 WORLD_SIZE=2", "RANK=2 with WORLD_SIZE=2"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=first", "LOCAL_RANK is 'first', which is no whole number"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "local rank 2 of 2 on this machine"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=3", "local rank 0 of 3 on this machine, with WORLD_SIZE=2"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_SIZE=0", "local rank 0 of 0 on this machine"),
    ("RANK=0 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2", "LOCAL_RANK is not set"),
    ("RANK=0 WORLD_SIZE=1 MASTER_PORT=port", "MASTER_PORT is 'port', which is no whole number"),
    ("RANK=0 WORLD_SIZE=1 MASTER_PORT=65536", "MASTER_PORT=65536 is no port"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_PORT=0", "MASTER_PORT=0 is no port"),
    ("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_RANK=1 is set and OMPI_COMM_WORLD_SIZE is not"),
    ("OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_SIZE=2 is set and OMPI_COMM_WORLD_RANK is not"),
    ("OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK=2 with OMPI_COMM_WORLD_SIZE=2"),
    ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=a", "OMPI_COMM_WORLD_LOCAL_RANK is 'a'"),
    ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=a", "OMPI_COMM_WORLD_LOCAL_SIZE is 'a'"),
    ("PMI_RANK=0", "PMI_RANK=0 is set and PMI_SIZE is not"),
    ("PMI_SIZE=4", "PMI_SIZE=4 is set and PMI_RANK is not"),
    ("PMI_RANK=0 PMI_SIZE=four", "PMI_SIZE is 'four', which is no whole number"),
    ("SLURM_PROCID=a SLURM_STEP_NUM_TASKS=2", "SLURM_PROCID is 'a', which is no whole number"),
    ("SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=2", "SLURM_PROCID=2 with SLURM_STEP_NUM_TASKS=2"),
    ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=one", "'one' is no number for each node"),
    ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=", "local rank 0 of 0 on this machine"),
    ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_NODEID=b", "SLURM_NODEID is 'b'"),
]
_FAMILIES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI_", "SLURM_", "LUMINA_")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "data.jsonl").write_text(
        '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n'
    )
    return ["train", "--config", "nano", "--train-data", str(tmp_path / "data.jsonl"), "--output-dir", str(tmp_path)]


@pytest.mark.parametrize(("attack", "said"), ATTACKS, ids=[attack[:80] for attack, _ in ATTACKS])
def test_one_message(
    attack: str, said: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith(_FAMILIES)]:
        monkeypatch.delenv(name)
    for assignment in shlex.split(attack):
        monkeypatch.setenv(*assignment.split("=", 1))
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [line for line in lines if said in line]
    assert lines[-1].startswith("  "), "the remedy"


def test_as_a_process_of_its_own(words: list[str], tmp_path: Path) -> None:
    """The first of them, where torch is not even there to be loaded."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')\n")
    environment = {**clean_environment(), "PYTHONPATH": str(tmp_path), "RANK": "0"}
    command = [sys.executable, "-P", "-m", "lumina", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, ATTACKS[0][1] in done.stderr) == (2, True), done.stderr
