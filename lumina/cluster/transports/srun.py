"""A step of the Slurm allocation on each node (srun(1)). LUMINA_SRUN holds more options for srun, LUMINA_CONTAINER the
command that runs another one in a container (docs/slurm.md)."""

from __future__ import annotations

import os
import shlex

from lumina.cluster.hostfile import Host
from lumina.cluster.transport import RemoteModule


class _Srun:
    def command(self, host: Host, remote: RemoteModule) -> list[str]:
        size = ["--cpus-per-task", str(remote.cpus)] if remote.cpus else []
        size += _gpus(remote.gpus)
        step = ["--nodes=1", "--ntasks=1", "--nodelist", host.name, "--overlap", "--chdir", remote.folder]
        site = shlex.split(os.environ.get("LUMINA_SRUN", ""))
        inside = shlex.split(os.environ.get("LUMINA_CONTAINER", ""))
        return ["srun", "--job-name=lumina", "--kill-on-bad-exit=0", *step, *size, *site, *inside, *remote.words()]


def _gpus(count: int) -> list[str]:
    """All of the node's GPUs for the step, whose one task starts the ranks. Without these words it has what the job's
    own options say, which srun reads from the environment: --gpus is the whole job's and cannot be had on one node,
    --gpus-per-task is one rank's."""
    said = {"SLURM_GPUS": "--gpus", "SLURM_GPUS_PER_TASK": "--gpus-per-task"}
    return [word for name, option in said.items() if count and name in os.environ for word in (option, str(count))]


TRANSPORT = _Srun()
