"""The launcher's command line, found above a process of its job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.cluster.command_line import typed

LAUNCHER = f"""#!{sys.executable}
import subprocess, sys
subprocess.run([sys.executable, "-P", "-c", sys.argv[-1]], check=True)
"""
RANK = "import json; from lumina.cluster import launch_command; print(json.dumps(launch_command()))"


@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "lumina"])
def test_a_rank_finds_how_its_job_was_launched(name: str, tmp_path: Path) -> None:
    program = tmp_path / name
    program.write_text(LAUNCHER, encoding="utf-8")
    program.chmod(0o755)
    words = ["launch", "a b"] if name == "lumina" else ["--nproc-per-node", "2", "a b"]
    done = subprocess.run([program, *words, RANK], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [name, *words, RANK]


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["/v/bin/python", "-u", "/v/bin/torchrun", "train.py"], ["torchrun", "train.py"]),
        (["/v/bin/python3.11", "-m", "lumina", "launch", "train"], ["lumina", "launch", "train"]),
        (["/v/bin/python", "/v/bin/lumina", "train"], None),  # a rank, not a launcher
        (["/v/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--x"], None),  # nobody types it
        (["mpirun", "-n", "2"], ["mpirun", "-n", "2"]),
        (["/bin/bash", "torchrun"], None),
        (["python"], None),
        ([], None),
    ],
)
def test_what_a_user_types(argv: list[str], found: list[str] | None) -> None:
    assert typed(argv) == found
