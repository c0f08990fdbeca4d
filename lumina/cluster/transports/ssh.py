"""One ssh a node (ssh(1)), with keys and without a password."""

from __future__ import annotations

from lumina.cluster.hostfile import Host
from lumina.cluster.transport import SSH_OPTIONS, RemoteModule


class _Ssh:
    def command(self, host: Host, remote: RemoteModule) -> list[str]:
        return ["ssh", *SSH_OPTIONS, host.name, remote.shell()]


TRANSPORT = _Ssh()
