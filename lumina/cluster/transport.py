"""Transport: the exact command that starts an agent on a node, for ssh, pdsh, srun or this machine.

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
from typing import Protocol

from lumina.cluster.hostfile import Host
from lumina.config import TRANSPORTS

# A cable that is cut sends nothing: ssh itself asks every five seconds and gives up after three silences.
_SSH = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5")
SSH_OPTIONS = (*_SSH, "-o", "ServerAliveCountMax=3")
# Else torch warns of every connection whose other side has no name in DNS.
_QUIET = "TORCH_CPP_LOG_LEVEL=ERROR"


@dataclass(frozen=True)
class RemoteModule:
    """`python -m MODULE SPEC`, to be run in a folder of a node. cpus, gpus: of the node, for Slurm's step; None, 0: not
    said."""

    module: str
    folder: str
    python: str = sys.executable
    cpus: int | None = None
    gpus: int = 0

    def words(self) -> list[str]:
        """The command itself, which reads its spec from standard input."""
        return [self.python, "-m", self.module, "-"]

    def shell(self, spec: str = "-") -> str:
        """The same as one line for a login shell, which is somewhere else when it starts; of csh's family or fish too,
        which know no NAME=value before a command."""
        return f"cd {shlex.quote(self.folder)} && exec env {_QUIET} {shlex.quote(self.python)} -m {self.module} {spec}"


class Transport(Protocol):
    """How a command is started on a node. One that forwards no standard input ends its command's last word in SPEC."""

    def command(self, host: Host, remote: RemoteModule) -> list[str]: ...


SPEC = "{spec}"  # replaced by `with_spec`


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


def choose(name: str, host: Host) -> str:
    """`auto`: no ssh for this machine itself, ssh for the others."""
    return ("local" if is_here(host) else "ssh") if name == "auto" else name


def remote_command(name: str, host: Host, remote: RemoteModule) -> list[str]:
    """The command that runs `remote` on a host by the transport called `name`. Raises UserError where a transport of
    another package does not load."""
    transport: Transport = TRANSPORTS.get(name)
    return transport.command(host, remote)


def with_spec(command: list[str], spec: Spec) -> tuple[list[str], str]:
    """The command to run and what to write to its standard input."""
    if SPEC in command[-1]:
        return [*command[:-1], command[-1].replace(SPEC, base64.b64encode(spec.dump().encode()).decode())], ""
    return command, spec.dump() + "\n"


def launcher_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the ssh, pdsh or srun process itself. The user's own options for pdsh's ssh come first: of an
    option that is given twice, ssh takes the first."""
    quiet = dict([_QUIET.split("=")])
    options = " ".join(filter(None, (environment.get("PDSH_SSH_ARGS_APPEND"), *SSH_OPTIONS)))
    return {**quiet, **environment, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": options}
