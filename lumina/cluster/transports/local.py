"""This machine itself, without any remote shell."""

from __future__ import annotations

from lumina.cluster.hostfile import Host
from lumina.cluster.transport import RemoteModule


class _Local:
    def command(self, host: Host, remote: RemoteModule) -> list[str]:
        return remote.words()


TRANSPORT = _Local()
