"""torch's elastic agent with its private methods under public names: the one place of this room that knows them.

torch calls `_monitor_workers`, `_stop_workers`, `_shutdown` and `_exit_barrier` of the agent that it is given. One that
torch renamed would not be called any more, without a word: their names are checked when this module is imported.
"""

from __future__ import annotations

import signal
import subprocess
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from lumina.config.private_names import PrivateName, require

_SERVER = "torch.distributed.elastic.agent.server"
_LOCAL = f"{_SERVER}.local_elastic_agent:LocalElasticAgent"

NAMES = (
    PrivateName(_LOCAL, "_monitor_workers", "a look at the ranks", ("worker_group",)),
    PrivateName(_LOCAL, "_stop_workers", "ending the ranks of a broken group", ("worker_group",)),
    PrivateName(_LOCAL, "_shutdown", "ending the ranks by a signal", ("death_sig", "timeout")),
    PrivateName(f"{_SERVER}.api:SimpleElasticAgent", "_exit_barrier", "the wait for the other nodes", ()),
    PrivateName(_LOCAL, "_pcontext", "the ranks' processes"),
    PrivateName(
        "torch.distributed.elastic.multiprocessing.api:SubprocessContext", "subprocess_handlers", "the ranks' processes"
    ),
    PrivateName("torch.distributed.elastic.multiprocessing.subprocess_handler:SubprocessHandler", "proc", "a process"),
)
require("torch", NAMES)


class RankAgent(LocalElasticAgent):
    """Starts, watches and ends the ranks of one node. Subclasses override what is below, and nothing else of torch's.

    `end_ranks` is torch's own too: when the group is regrouped, and at the end of `run`."""

    def look(self, worker_group: WorkerGroup) -> RunResult:
        """How the ranks are; called by torch every `monitor_interval` seconds."""
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def stop_ranks(self) -> None:
        """End the ranks of a group that is broken or to be regrouped."""
        self.end_ranks()

    def end_ranks(self, number: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Send a signal to every rank; after `timeout` seconds SIGKILL."""
        super()._shutdown(number, timeout)

    def await_others(self) -> None:
        """Called when this node's ranks have succeeded; returns when those of every node have."""
        super()._exit_barrier()  # type: ignore[no-untyped-call]

    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The ranks' processes, none before the first are started."""
        context: Any = self._pcontext  # a SubprocessContext, since what is started is a program
        return [handler.proc for handler in context.subprocess_handlers.values()] if context else []

    # --- What torch calls ---

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        return self.look(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self.stop_ranks()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self.end_ranks(death_sig, timeout)

    def _exit_barrier(self) -> None:
        self.await_others()
