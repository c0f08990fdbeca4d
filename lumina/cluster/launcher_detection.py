"""Launcher detection: rank, world size and rendezvous address, from whichever launcher started this process.

torchrun, DeepSpeed's launcher and Lumina's agents say it in RANK and its companions. Open MPI, MPICH, Intel MPI and
srun have names of their own, and none of them says where to meet: that comes from mpi4py where it is installed, from
Slurm's node list, or is this machine when all ranks are on it.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lumina.cluster import slurm
from lumina.cluster.environment import number
from lumina.config import UserError, install_command

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_LOWEST_PORT = 10_000  # below are those of services
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "")
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
# A part of what a launcher sets, what it never comes without, and a value that a single process may have as well.
_PARTS = (
    ("WORLD_SIZE", "RANK", "1"),
    ("LOCAL_RANK", "RANK", "0"),
    *((name, other, "") for rank, world in (_SOURCES[n][:2] for n in ("Open MPI", "MPI"))
      for name, other in ((rank, world), (world, rank))),
)  # fmt: skip


class Launched(NamedTuple):
    """What a launcher says of this process. `launcher`: its name, None for a process that was started alone;
    `variables`: where its rank and the world size were read."""

    launcher: str | None
    rank: int
    world: int
    local_rank: int
    local_world: int
    variables: tuple[str, str] = ("RANK", "WORLD_SIZE")


def launched(environment: Mapping[str, str] = os.environ) -> Launched:
    """Rank and world size of this process, of all ranks and of those on its machine, from whichever launcher started
    it; a process that was started alone is a world of one. Changes nothing.

    Raises UserError, naming the variable, where one is missing or contradicts another.
    """
    if "RANK" in environment:
        found = _by_torch(environment)
    else:
        launcher = next((name for name in _SOURCES if _started_by(name, environment)), None)
        if launcher is None:
            return _alone(environment)
        found = _by(launcher, environment)
    rank_name, world_name = found.variables
    if found.rank >= found.world:
        raise UserError(
            f"{rank_name}={found.rank} with {world_name}={found.world}",
            "Ranks count from 0 to the world size less 1.",
        )
    if not found.local_rank < found.local_world <= found.world:
        raise UserError(
            f"local rank {found.local_rank} of {found.local_world} on this machine, with {world_name}={found.world}",
            "Local ranks count from 0 on each machine. docs/cluster.md has launchers that set them.",
        )
    port = number("MASTER_PORT", environment, 1)
    if port > 65535 or (port == 0 and found.world > 1):  # 0: any free one, which the others could not know
        raise UserError(f"MASTER_PORT={environment['MASTER_PORT']} is no port", "Ports are 1 to 65535.")
    return found


def _by_torch(environment: Mapping[str, str]) -> Launched:
    rank = number("RANK", environment)
    if "WORLD_SIZE" not in environment:
        raise UserError(f"RANK={rank} is set and WORLD_SIZE is not", "Set both, or unset RANK to train in one process.")
    world = number("WORLD_SIZE", environment)
    here = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"  # DeepSpeed's launcher
    if here not in environment and "LOCAL_RANK" not in environment:
        # Set by hand: all ranks are here, or one in each Kubernetes pod.
        together = environment.get("MASTER_ADDR", "localhost") in _LOOPBACK
        return Launched("torch", rank, world, *((rank, world) if together else (0, 1)))
    local_world = number(here, environment, world)
    default = 0 if local_world == 1 else rank if local_world == world else None
    return Launched("torch", rank, world, number("LOCAL_RANK", environment, default), local_world)


def _by(launcher: str, environment: Mapping[str, str]) -> Launched:
    rank_name, world_name, local_name, here_name = _SOURCES[launcher]
    rank, world = number(rank_name, environment), number(world_name, environment)
    local_rank = number(local_name, environment, rank)
    if here_name not in environment:
        local_world = world
    elif launcher == "Slurm":
        local_world = _own_count(environment[here_name], environment)
    else:
        local_world = number(here_name, environment)
    return Launched(launcher, rank, world, local_rank, local_world, (rank_name, world_name))


def _alone(environment: Mapping[str, str]) -> Launched:
    """A world of one, unless what is set is a part of what a launcher sets: each process would train alone."""
    for name, missing, harmless in _PARTS:
        if environment.get(name, harmless) != harmless and missing not in environment:
            raise UserError(
                f"{name}={environment[name]} is set and {missing} is not",
                f"Set both, or unset {name} to train in one process.",
            )
    return Launched(None, 0, 1, 0, 1)


def detect_launcher(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from whichever launcher
    started this process. Returns the launcher's name, or None for a process that was started alone, which becomes a
    world of one.

    Raises UserError as `launched` does, and when the ranks are on several machines and nothing says where they meet.
    """
    found = launched(environment)
    environment.update(zip(_NAMES, map(str, found[1:5]), strict=True))
    if found.launcher is None:
        # 0: a free port when rank 0 listens. One that was looked for before could be another's by then.
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        return None
    if not environment.get("MASTER_ADDR") or "MASTER_PORT" not in environment:
        address, port = _meeting_place(found, environment)
        environment["MASTER_ADDR"] = environment.get("MASTER_ADDR") or address
        environment.setdefault("MASTER_PORT", str(port))
    return found.launcher


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
    """A port of this machine that nobody listens at, for a process that will later. Not one of those that the kernel
    gives to whoever asks for any: by then it may be a connection's, or another listener's."""
    first = 32768  # Linux's own choice
    with suppress(OSError, ValueError, IndexError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    for port in (_LOWEST_PORT + secrets.randbelow(first - _LOWEST_PORT) for _ in range(100) if first > _LOWEST_PORT):
        with suppress(OSError), socket.create_server(("", port)):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _started_by(launcher: str, environment: Mapping[str, str]) -> bool:
    """A rank and a world size are there. A batch script also has SLURM_PROCID, but is no step of several tasks; and
    srun with its PMI plugin sets PMI_RANK too, but none of MPICH's local ranks."""
    rank, world, local, _ = _SOURCES[launcher]
    by_srun = launcher == "MPI" and local not in environment and _SOURCES["Slurm"][1] in environment
    return rank in environment and world in environment and not by_srun


def _own_count(text: str, environment: Mapping[str, str]) -> int:
    """Tasks of this node, of a Slurm step's, which are written like 2(x3),1."""
    counts, node = slurm.counts(text), number("SLURM_NODEID", environment, 0)
    return counts[node] if node < len(counts) else counts[0] if counts else 0


def _meeting_place(found: Launched, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of rank 0, the same on every rank."""
    if found.launcher == "torch":
        if found.local_world < found.world and not environment.get("MASTER_ADDR"):
            raise _nowhere(found, "E")
        return "127.0.0.1", 29500
    # One job's ranks agree on a port by its name; another job on the same machines has another name.
    job = next((environment[n] for n in ("PMIX_NAMESPACE", "SLURM_STEP_ID", "PMI_JOBID") if n in environment), "")
    port = 20000 + zlib.crc32(f"{environment.get('SLURM_JOB_ID', '')}/{job}".encode()) % 12000
    if found.local_world == found.world:
        return "127.0.0.1", port
    if found.launcher == "Slurm":
        return slurm.expand(environment.get("SLURM_STEP_NODELIST", ""))[0], port
    try:
        from mpi4py import MPI
    except ImportError:
        raise _nowhere(found, f"Install mpi4py ({install_command('mpi')}), or e") from None
    place: tuple[str, int] = MPI.COMM_WORLD.bcast((socket.getfqdn(), free_port()))
    MPI.Finalize()  # a rank may end without passing through the interpreter's exit, where mpi4py would do it
    return place


def _nowhere(found: Launched, begin: str) -> UserError:
    return UserError(
        f"{found.launcher} started ranks on several machines, and nothing says where they meet",
        f"{begin}xport MASTER_ADDR (rank 0's host) and MASTER_PORT to every rank.",
    )
