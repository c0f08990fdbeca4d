"""Slurm allocation: its nodes, ranks and CPUs, from the environment of its jobs (sbatch(1), srun(1))."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from lumina.cluster.environment import number
from lumina.cluster.hostfile import Host
from lumina.config import UserError

MOST_NODES = 65_536  # of a list or of its counts; Slurm's own limit of a range
_COUNT = re.compile(r"(\d{1,9})(?:\(x(\d{1,9})\))?", re.ASCII)
_NAMES = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")  # one element of a node list: n7, or r[1-2]c[01-12,20]
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_CHANGED = "Was a SLURM_… variable changed by hand?"
_ON_NODES = re.compile(r"\bNodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)")
_GPUS = re.compile(r"\bgpu(?::[^:(),]+)?:(\d+)")  # gpu:2(IDX:0-1), gpu:h100:8(IDX:0-7)


def in_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    return "SLURM_JOB_ID" in environment and ("SLURM_JOB_NODELIST" in environment or _components(environment) > 1)


def hosts(environment: Mapping[str, str] = os.environ) -> list[Host]:
    """The allocation's nodes with the ranks each gets: its tasks where the job asked for a number of tasks (--ntasks,
    --ntasks-per-node), else one for each of its GPUs, else one.

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
    slots = tasks(names, environment) or [own or 1 for own in gpus(names, environment)]
    return [Host(name, count) for name, count in zip(names, slots, strict=True)]


def tasks(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[int]:
    """Tasks of the allocation on each of its nodes; none where the job asked for no number of tasks: what Slurm says
    then is a task for each node, or with --exclusive for each of its CPUs."""
    asked = _first(environment.get("SLURM_NTASKS_PER_NODE", ""))
    if not asked and "SLURM_NTASKS" not in environment:
        return []
    divided = counts(environment.get("SLURM_TASKS_PER_NODE", ""))
    # A shell that srun started has the counts of its own step, which may be on fewer nodes.
    return divided if len(divided) == len(names) else [asked] * len(names) if asked else []


def _components(environment: Mapping[str, str]) -> int:
    return number("SLURM_HET_SIZE", environment, 1)


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
    """Slurm's way of writing a number for each node: 72(x2),36. Raises UserError for anything else."""
    words = text.split(",") if text else []
    read = [_COUNT.fullmatch(word) for word in words]
    repeated = [(int(found[1]), int(found[2] or 1)) for found in read if found]
    if len(repeated) < len(words) or sum(times for _, times in repeated) > MOST_NODES:
        raise UserError(
            f"{text!r} is no number for each node, as Slurm writes it: 72(x2),36",
            _CHANGED,
        )
    return [count for count, times in repeated for _ in range(times)]


def expand(nodelist: str) -> list[str]:
    """The names that a node list like n[01-03,7],login means, in its order; the first number of a range says how many
    digits all of it have. Read here and not by scontrol, which a container may lack.

    Raises UserError for anything else, and for more than MOST_NODES.
    """
    elements = _NAMES.findall(nodelist)
    names: list[str] = []
    for element in elements if elements and ",".join(elements) == nodelist else [""]:
        parts = [part for part in re.split(r"(\[.*?\])", element) if part]
        choices = [_numbers(part[1:-1]) if part[0] == "[" else [part] for part in parts]
        if not choices or not all(choices):
            raise UserError(f"{nodelist!r} is no node list, as Slurm writes it: n[01-03,7],login", _CHANGED)
        combined = itertools.product(*choices)
        names += map("".join, itertools.islice(combined, MOST_NODES + 1 - len(names)))
        if len(names) > MOST_NODES:
            raise UserError(f"{nodelist!r} means more than {MOST_NODES:,} nodes", _CHANGED)
    return names


def _numbers(ranges: str) -> list[str]:
    """01-03,7: its numbers as they are written; none where it is no such text, MOST_NODES and one where it is more."""
    found: list[str] = []
    for text in ranges.split(","):
        match = _RANGE.fullmatch(text)
        if match is None or len(text) > 40 or int(match[1]) > int(match[2] or match[1]):
            return []
        low, high = int(match[1]), int(match[2] or match[1])
        room = MOST_NODES + 1 - len(found)
        found += [str(value).zfill(len(match[1])) for value in range(low, min(high + 1, low + room))]
    return found
