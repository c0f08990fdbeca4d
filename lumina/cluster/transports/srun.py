"""A step of the Slurm allocation on each node (srun(1))."""

from __future__ import annotations

from lumina.cluster.hostfile import Host
from lumina.cluster.transport import RemoteModule


class _Srun:
    def command(self, host: Host, remote: RemoteModule) -> list[str]:
        size = ["--cpus-per-task", str(remote.cpus)] if remote.cpus else []
        step = ["--nodes=1", "--ntasks=1", "--nodelist", host.name, "--overlap", "--chdir", remote.folder]
        return ["srun", "--job-name=lumina", "--kill-on-bad-exit=0", *step, *size, *remote.words()]


TRANSPORT = _Srun()
