"""Slurm allocation: its nodes, ranks and CPUs, from the environment of its jobs (sbatch(1), srun(1))."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

from lumina.cluster.hostfile import Host
from lumina.config import UserError

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def in_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    return "SLURM_JOB_ID" in environment and "SLURM_JOB_NODELIST" in environment


def hosts(environment: Mapping[str, str] = os.environ) -> list[Host]:
    """The allocation's nodes with the ranks each gets: --ntasks-per-node, else one for each GPU, else one.

    Raises UserError outside an allocation.
    """
    if not in_allocation(environment):
        raise UserError("not inside a Slurm allocation", "Start with: sbatch launchers/train.sbatch …, or salloc.")
    names = expand(environment["SLURM_JOB_NODELIST"])
    tasks = environment.get("SLURM_NTASKS_PER_NODE") or environment.get("SLURM_GPUS_ON_NODE") or "1"
    return [Host(name, max(1, int(_COUNT.match(tasks)[1]))) for name in names]  # type: ignore[index]


def cpus(environment: Mapping[str, str] = os.environ) -> list[int]:
    """CPUs of the allocation on each node, in its order: `SLURM_JOB_CPUS_PER_NODE`, written like 72(x2),36."""
    return counts(environment.get("SLURM_JOB_CPUS_PER_NODE", ""))


def counts(text: str) -> list[int]:
    """Slurm's way of writing a number for each node: 72(x2),36."""
    return [int(count) for count, times in _COUNT.findall(text) for _ in range(int(times or 1))]


def expand(nodelist: str) -> list[str]:
    """The names that a node list like n[01-03,7],login means, through Slurm's own scontrol.

    Raises UserError when scontrol does not answer.
    """
    if "[" not in nodelist:
        return [name for name in nodelist.split(",") if name]
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise UserError(f"scontrol cannot expand {nodelist}: {said}", "Is Slurm's bin folder on PATH?") from None
    return done.stdout.split()
