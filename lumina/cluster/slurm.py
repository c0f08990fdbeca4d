"""Slurm allocation: its nodes, ranks and CPUs, from the environment of its jobs (sbatch(1), srun(1))."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from lumina.cluster.hostfile import Host
from lumina.config import UserError

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_ON_NODES = re.compile(r"\bNodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)")
_GPUS = re.compile(r"\bgpu(?::[^:(),]+)?:(\d+)")  # gpu:2(IDX:0-1), gpu:h100:8(IDX:0-7)


def in_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    return "SLURM_JOB_ID" in environment and ("SLURM_JOB_NODELIST" in environment or _components(environment) > 1)


def hosts(environment: Mapping[str, str] = os.environ) -> list[Host]:
    """The allocation's nodes with the ranks each gets: --ntasks-per-node, else one for each of its GPUs, else one.

    Raises UserError outside an allocation, and in a heterogeneous job, of which these variables tell the first part.
    """
    if not in_allocation(environment):
        raise UserError("not inside a Slurm allocation", "Start with: sbatch launchers/train.sbatch …, or salloc.")
    if _components(environment) > 1:
        raise UserError(
            f"a heterogeneous job of {_components(environment)} components",
            "Ask for all nodes in one component, or name them with --hostfile, over ssh (docs/slurm.md).",
        )
    names = expand(environment["SLURM_JOB_NODELIST"])
    tasks = _first(environment.get("SLURM_NTASKS_PER_NODE", ""))
    return [Host(name, tasks or own or 1) for name, own in zip(names, gpus(names, environment), strict=True)]


def _components(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_HET_SIZE", "1"))


def gpus(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[int]:
    """GPUs of the allocation on each of its nodes; 0 where Slurm does not say.

    A batch job is told what its first node has, a shell of salloc only what --gpus-per-node asked for (8, or h100:8).
    What --gpus=N divided among the nodes, and what --gres or --gpus-per-task gave a shell, scontrol alone knows.
    """
    each = _first(environment.get("SLURM_GPUS_ON_NODE", "")) or sum(
        _first(kind.rpartition(":")[2]) for kind in environment.get("SLURM_GPUS_PER_NODE", "").split(",")
    )
    if each and "SLURM_GPUS" not in environment:
        return [each] * len(names)
    found = _allocated_gpus(environment["SLURM_JOB_ID"])
    return [found.get(name, each) for name in names]


def _allocated_gpus(job: str) -> dict[str, int]:
    """GPUs of a job by node, as scontrol shows them; none where it does not answer."""
    asked = ["scontrol", "--oneliner", "--details", "show", "job", job]
    try:
        shown = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[str, int] = {}
    for nodes, resources in _ON_NODES.findall(shown):
        count = sum(map(int, _GPUS.findall(resources)))
        found |= dict.fromkeys(expand(nodes), count)
    return found


def _first(text: str) -> int:
    """The first of the numbers that Slurm gives for each node; 0 where there is none."""
    found = _COUNT.match(text)
    return int(found[1]) if found else 0


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
