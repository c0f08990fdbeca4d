"""Failures of ranks: what each one was, and which of several was the first cause."""

from __future__ import annotations

import re
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lumina.cluster.signals import EXIT_HUNG
from lumina.processes import how_it_ended

# What the other ranks of a collective report when one of them is gone: an effect, never the cause.
_EFFECT = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|reset by peer|broken pipe|socket timeout|recvv|gloo.*"
    r"(timed? ?out|connect)|nccl.*(remote|abort|system error|timeout)|in the collective|store.*(closed|timeout)",
    re.IGNORECASE,
)
USER_ERROR = 2  # the exit code of a user's mistake, which no restart will mend


@dataclass
class Failure:
    """One rank's end. exitcode is minus the signal's number where a signal ended it; time in seconds since 1970 by the
    host's own clock."""

    host: str
    rank: int
    local_rank: int
    pid: int
    exitcode: int
    message: str = ""
    traceback: str = ""
    time: float = 0.0
    out_of_memory: bool = False

    @property
    def is_effect(self) -> bool:
        """Whether it only says that another rank went away, or was ended by the agent for that."""
        text = self.message or self.traceback.strip().rpartition("\n")[2]
        return self.exitcode == -signal.SIGTERM or bool(_EFFECT.search(text))

    def cause(self) -> str:
        if self.out_of_memory:
            return "killed by the kernel for want of memory (SIGKILL after an out-of-memory event on this host)"
        if self.exitcode < 0:
            return f"ended by {how_it_ended(self.exitcode)}" + (f": {self.message}" if self.message else "")
        if self.exitcode == EXIT_HUNG and not self.message:
            return "hung: its watchdog ended it"
        return self.message or how_it_ended(self.exitcode)

    def line(self) -> str:
        return f"rank {self.rank} on {self.host} (local rank {self.local_rank}, pid {self.pid}): {self.cause()}"

    def record(self) -> dict[str, Any]:
        return asdict(self)


def first_cause(failures: list[Failure]) -> Failure:
    """The failure to name: one that is no mere effect of another, the earliest of those."""
    causes = [failure for failure in failures if not failure.is_effect]
    return min(causes or failures, key=lambda failure: failure.time)


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory on this machine since it started, in any cgroup."""
    try:
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
