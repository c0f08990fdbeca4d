"""How an agent is started on a node: the exact command, for ssh, pdsh, srun or this machine.

What the agent is to do (arguments, environment, job) reaches it as one line of JSON on its standard input, so that no
value ever passes through a shell: blank lines, commas and quotes do no harm, and secrets do not show in `ps`. pdsh does
not forward its input: there the line is base64 in the command.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from lumina.cluster.hostfile import Host

Kind = Literal["auto", "ssh", "pdsh", "srun", "local"]

# A cable that is cut sends nothing: ssh itself asks every five seconds and gives up after three silences.
_SSH = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5")
# Else torch warns of every connection whose other side has no name in DNS.
_QUIET = "TORCH_CPP_LOG_LEVEL=ERROR"
_SSH_OPTIONS = (*_SSH, "-o", "ServerAliveCountMax=3")


@dataclass
class Spec:
    """What an agent needs to know. `store` is HOST:PORT of the launcher's store; times in seconds."""

    store: str
    job: str
    node: str
    slots: int
    command: list[str]
    environment: dict[str, str]
    folder: str
    stop_timeout: float = 60.0
    bind: bool = True

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Spec:
        """Reads `dump`'s line, or the same in base64."""
        text = text.strip()
        return cls(**json.loads(text if text.startswith("{") else base64.b64decode(text)))


def is_here(host: Host) -> bool:
    """Whether a host's name means this machine."""
    return host.name in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn())


def resolved(name: str) -> str:
    """A host's address; an ssh alias that DNS does not know is looked up in ssh's configuration, and comes back as the
    name that stands there (or as it is)."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        shown = subprocess.run(["ssh", "-G", name], capture_output=True, text=True, check=False).stdout
        return next((line.split()[1] for line in shown.splitlines() if line.startswith("hostname ")), name)


def choose(kind: Kind, host: Host) -> Kind:
    """`auto`: no ssh for this machine itself, ssh for the others."""
    return ("local" if is_here(host) else "ssh") if kind == "auto" else kind


def remote_command(
    kind: Kind, host: Host, module: str, folder: str, python: str = sys.executable, cpus: int | None = None
) -> list[str]:
    """The command that runs `python -m MODULE SPEC` on a host, SPEC being `-` for standard input. pdsh's own ends in
    {spec}, to be replaced by `with_spec`."""
    there = f"cd {shlex.quote(folder)} && {_QUIET} exec {shlex.quote(python)} -m {module} "
    if kind == "local":
        return [python, "-m", module, "-"]
    if kind == "ssh":
        return ["ssh", *_SSH_OPTIONS, host.name, f"{there}-"]
    if kind == "pdsh":
        # pdsh replaces %h and the like in its command, and prefixes every line with the host's name unless told not to.
        return ["pdsh", "-S", "-N", "-R", "ssh", "-w", host.name, there.replace("%", "%%") + "{spec}"]
    if kind == "srun":
        size = ["--cpus-per-task", str(cpus)] if cpus else []
        step = ["--nodes=1", "--ntasks=1", "--nodelist", host.name, "--overlap", "--chdir", folder]
        return ["srun", "--job-name=lumina", "--kill-on-bad-exit=0", *step, *size, python, "-m", module, "-"]
    raise AssertionError(kind)


def with_spec(command: list[str], spec: Spec) -> tuple[list[str], str]:
    """The command to run and what to write to its standard input."""
    if "{spec}" in command[-1]:
        return [*command[:-1], command[-1].replace("{spec}", base64.b64encode(spec.dump().encode()).decode())], ""
    return command, spec.dump() + "\n"


def launcher_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the ssh, pdsh or srun process itself."""
    quiet = dict([_QUIET.split("=")])
    return {**quiet, **environment, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": " ".join(_SSH_OPTIONS)}
