"""pdsh over ssh, one a node (pdsh(1)), as DeepSpeed's launcher uses it."""

from __future__ import annotations

from lumina.cluster.hostfile import Host
from lumina.cluster.transport import SPEC, RemoteModule


class _Pdsh:
    def command(self, host: Host, remote: RemoteModule) -> list[str]:
        # pdsh replaces %h and the like in its command, and prefixes every line with the host's name unless told not to.
        shell = remote.shell("").replace("%", "%%") + SPEC
        return ["pdsh", "-S", "-N", "-R", "ssh", "-w", host.name, shell]


TRANSPORT = _Pdsh()
