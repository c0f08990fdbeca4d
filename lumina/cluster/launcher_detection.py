"""Launcher detection: rank, world size and rendezvous address, from whichever launcher started this process.

torchrun, DeepSpeed's launcher and Lumina's agents say it in RANK and its companions. Open MPI, MPICH, Intel MPI and
srun have names of their own, and none of them says where to meet: that comes from mpi4py where it is installed, from
Slurm's node list, or is this machine when all ranks are on it.
"""

from __future__ import annotations

import os
import signal
import socket
import zlib
from collections.abc import Mapping, MutableMapping

from lumina.cluster import slurm
from lumina.config import UserError, install_command

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SOURCES = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def detect_launcher(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from whichever launcher
    started this process. Returns the launcher's name, or None for a process that was started alone, which becomes a
    world of one.

    Raises UserError when the ranks are on several machines and nothing says where they meet.
    """
    if "RANK" in environment:
        if "LOCAL_WORLD_SIZE" not in environment:
            environment["LOCAL_WORLD_SIZE"] = environment.get("LOCAL_SIZE", environment.get("WORLD_SIZE", "1"))
        environment.setdefault("LOCAL_RANK", "0")
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", "29500")
        return "torch"
    launcher = next((name for name in _SOURCES if _started_by(name, environment)), None)
    if launcher is None:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        # 0: a free port when rank 0 listens. One that was looked for before could be another's by then.
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        return None
    for name, source in zip(_NAMES, _SOURCES[launcher], strict=True):
        environment[name] = (
            _own_count(environment[source], environment) if source in environment else _default(name, environment)
        )
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        address, port = _meeting_place(launcher, environment)
        environment.setdefault("MASTER_ADDR", address)
        environment.setdefault("MASTER_PORT", str(port))
    return launcher


def parent_signal() -> signal.Signals:
    """What a rank is sent when its launcher dies: an agent's ranks are started again elsewhere and must be gone at
    once; others have the time to save."""
    return signal.SIGKILL if "LUMINA_AGENT" in os.environ else signal.SIGTERM


def refuse_taken_port(port: int, flag: str) -> None:
    """UserError where this machine cannot listen at `port` (0: any free one). `flag`: what chooses another."""
    try:
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else "ports are 0 to 65535"
        raise UserError(
            f"cannot listen at port {port}: {why}", f"See who holds it (ss -ltnp), or choose another {flag}."
        ) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _started_by(launcher: str, environment: Mapping[str, str]) -> bool:
    """A rank and a world size are there. A batch script also has SLURM_PROCID, but is no step of several tasks; and
    srun with its PMI plugin sets PMI_RANK too, but none of MPICH's local ranks."""
    rank, world, local, _ = _SOURCES[launcher]
    by_srun = launcher == "MPI" and local not in environment and _SOURCES["Slurm"][1] in environment
    return rank in environment and world in environment and not by_srun


def _own_count(text: str, environment: Mapping[str, str]) -> str:
    """A number; or this node's, where the counts of a Slurm step's nodes are written like 2(x3),1."""
    counts, node = slurm.counts(text), int(environment.get("SLURM_NODEID", "0"))
    return str(counts[node] if node < len(counts) else counts[0])


def _default(name: str, environment: Mapping[str, str]) -> str:
    return environment["RANK"] if name == "LOCAL_RANK" else environment["WORLD_SIZE"]


def _meeting_place(launcher: str, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of rank 0, the same on every rank."""
    # One job's ranks agree on a port by its name; another job on the same machines has another name.
    job = next((environment[n] for n in ("PMIX_NAMESPACE", "SLURM_STEP_ID", "PMI_JOBID") if n in environment), "")
    port = 20000 + zlib.crc32(f"{environment.get('SLURM_JOB_ID', '')}/{job}".encode()) % 12000
    if environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"]:
        return "127.0.0.1", port
    if launcher == "Slurm":
        return slurm.expand(environment["SLURM_STEP_NODELIST"])[0], port
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            f"{launcher} started ranks on several machines, and nothing says where they meet",
            f"Install mpi4py ({install_command('mpi')}), or export MASTER_ADDR (rank 0's host) and MASTER_PORT to every"
            " rank.",
        ) from None
    place: tuple[str, int] = MPI.COMM_WORLD.bcast((socket.getfqdn(), free_port()))
    MPI.Finalize()  # a rank may end without passing through the interpreter's exit, where mpi4py would do it
    return place
