"""`lumina launch`: an elastic training job over many machines, which survives the loss of some."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
import uuid
from dataclasses import dataclass, field
from typing import Any

from lumina.cluster import slurm
from lumina.cluster.environment import forwarded, number
from lumina.cluster.hostfile import Host, read_hostfile
from lumina.cluster.launcher_detection import refuse_taken_port
from lumina.cluster.topology import choose_interface, rank_map
from lumina.cluster.transport import RemoteModule, Spec, choose, is_here, remote_command, resolved
from lumina.config import UserError
from lumina.terminal import say

AGENT = "lumina.cluster.elastic.agent"


@dataclass
class LaunchOptions:
    """The options of `lumina launch`. `words` is what follows `--`: `train …`, or a script with its arguments."""

    words: list[str]
    hostfile: str | None = None
    slurm: bool = False
    transport: str = "auto"
    min_nodes: int | None = None
    max_restarts: int = 10
    exports: list[str] = field(default_factory=list)
    job: str | None = None
    port: int = 0
    bind: bool = True
    python: str = field(default_factory=lambda: os.environ.get("LUMINA_PYTHON", sys.executable))
    stop_timeout: float = 60.0
    node_timeout: float = 12.0
    dry_run: bool = False


def launch(asked: LaunchOptions) -> int:
    """Run the job to its end; returns the exit code (see lumina.cluster.elastic.supervisor)."""
    hosts = _hosts(asked)
    min_nodes = len(hosts) if asked.min_nodes is None else asked.min_nodes
    if not 1 <= min_nodes <= len(hosts):
        raise UserError(f"--min-nodes {min_nodes} with {len(hosts)} node(s)", f"Choose 1 to {len(hosts)}.")
    ranks = rank_command(asked.words, asked.python)
    environment = forwarded(asked.exports)
    folder = os.getcwd()
    commands = _commands(asked, hosts, folder)
    if asked.dry_run:
        _show(hosts, commands, ranks, environment, folder)
        return 0
    refuse_taken_port(asked.port, "--port")  # before torch is loaded
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in the agents (lumina.cluster.transport)
    from lumina.cluster.elastic.control import LauncherControl
    from lumina.cluster.elastic.supervisor import Limits, Supervisor

    job = asked.job or os.environ.get("LUMINA_JOB") or _job_of_slurm() or uuid.uuid4().hex
    address = _own_address(hosts)
    control = LauncherControl(job, asked.port)
    _say(f"job {job}: {len(hosts)} node(s), store at {address}:{control.port}")

    def spec(host: Host) -> Spec:
        store = f"{address}:{control.port}"
        return Spec(store, job, host.name, host.slots, ranks, environment, folder, asked.stop_timeout, asked.bind)

    limits = Limits(min_nodes, asked.max_restarts, asked.node_timeout, stop_timeout=asked.stop_timeout)
    return Supervisor(list(zip(hosts, commands, strict=True)), spec, control, limits, _say).run()


def rank_command(words: list[str], python: str = sys.executable) -> list[str]:
    """The command of one rank: `train …` is `lumina train …`; a .py file is that script.

    Raises UserError for anything else.
    """
    if words and words[0] == "train":
        # By its module's name, but without the working directory on the path, where kernels/ would shadow a package.
        start = "import sys; sys.path[:] = [p for p in sys.path if p]; from lumina.cli import main; sys.exit(main())"
        return [python, "-c", start, *words]
    if words and words[0].endswith(".py"):
        return [python, *words]
    raise UserError(
        "lumina launch runs `train …` or a Python script",
        "Write: lumina launch --hostfile hostfile -- train --config nano --train-data F",
    )


def _hosts(asked: LaunchOptions) -> list[Host]:
    if asked.hostfile is not None:
        return read_hostfile(asked.hostfile)
    if asked.slurm or slurm.in_allocation():
        if number("SLURM_STEP_NUM_TASKS", default=1) > 1:
            raise UserError(
                "lumina launch was started several times, by srun",
                "Start it once, without srun (it starts a step on every node), or: srun … lumina train …",
            )
        hosts = slurm.hosts()
        owned = slurm.gpus([host.name for host in hosts])
        if idle := sum(max(own - host.slots, 0) for own, host in zip(owned, hosts, strict=True)):
            _say(
                f"WARNING: {idle} of this job's {sum(owned)} GPUs will be idle: leave --ntasks and "
                "--ntasks-per-node out for a rank on each GPU"
            )
        return hosts
    raise UserError("no nodes", "Give --hostfile FILE, or start inside a Slurm allocation (launchers/train.sbatch).")


def _commands(asked: LaunchOptions, hosts: list[Host], folder: str) -> list[list[str]]:
    name = "srun" if asked.transport == "auto" and asked.hostfile is None else asked.transport
    cpus = slurm.cpus() if name == "srun" else []
    gpus = slurm.gpus([host.name for host in hosts]) if name == "srun" and slurm.in_allocation() else [0] * len(hosts)
    commands = []
    for index, host in enumerate(hosts):
        chosen = choose(name, host)
        own = cpus[index] if index < len(cpus) else None
        command = remote_command(chosen, host, RemoteModule(AGENT, folder, asked.python, own, gpus[index]))
        if shutil.which(command[0]) is None and not asked.dry_run:
            raise UserError(f"{command[0]} is not installed here", "Install it, or choose another --transport.")
        commands.append(command)
    return commands


def _own_address(hosts: list[Host]) -> str:
    """The address at which the nodes reach this machine: of the interface that leads to the first one that is not
    this machine itself."""
    from lumina.cluster import topology

    other = next((host.name for host in hosts if not is_here(host)), None)
    if other is None:
        return "127.0.0.1"
    interface = choose_interface(topology.read(), resolved(other))
    _say(f"nodes reach this machine ({socket.gethostname()}) over {interface.name} at {interface.address}")
    return interface.address


def _job_of_slurm() -> str | None:
    """A name of this launch in a Slurm job, `slurm-NUMBER.RESTARTS.OWN`: one that is queued again keeps its number and
    goes on where it was, while two launches in one job are not each other's restart (lumina.checkpoint.lock)."""
    own, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT") or "0"
    return f"slurm-{own}.{restarts}.{uuid.uuid4().hex[:8]}" if own else None


def _show(hosts: list[Host], commands: list[list[str]], ranks: list[str], env: dict[str, Any], folder: str) -> None:
    say("# ranks:")
    for line in rank_map([(host.name, host.slots) for host in hosts]):
        say(f"#   {line}")
    say(f"# in {folder}, with these variables: {', '.join(sorted(env)) or 'none'}")
    say(f"# each rank: {shlex.join(ranks)}")
    for command in commands:
        say(shlex.join(command))


def _say(text: str) -> None:
    say(f"[lumina launch] {text}", flush=True)
