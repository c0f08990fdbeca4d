"""Elastic agent of one node, in groups that the launcher decides: rendezvous, and what the ranks' exit codes mean."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from lumina.cluster.elastic.control import AgentControl, ControlCommand
from lumina.cluster.elastic.failures import USER_ERROR, Failure, oom_kills
from lumina.cluster.elastic.torch_agent import RankAgent
from lumina.cluster.elastic.torch_store import PrefixStore
from lumina.cluster.launch_identity import FIRST_WORLD
from lumina.cluster.signals import EXIT_RESIZE, EXIT_STOPPED
from lumina.cluster.transport import Spec

POLL = 0.2  # seconds between looks at the ranks and the commands


class JobOverError(Exception):
    """The job is over for this agent."""

    def __init__(self, code: int) -> None:
        super().__init__(f"over with exit code {code}")
        self.code = code


class ReceivedCommands:
    """The launcher's commands as this agent has understood them so far."""

    def __init__(self, control: AgentControl) -> None:
        self.control = control
        self.joined = 0  # the generation that this agent's ranks belong to
        self.newest = ControlCommand("generation")
        self.regroup: ControlCommand | None = None
        self.stop = False
        self.failed = False  # the job was closed as a failure: nothing is left to save

    def poll(self) -> None:
        """Read new commands. Raises JobOverError when the job is closed."""
        for command in self.control.commands():
            if command.kind == "close":
                self.failed = command.code not in (0, EXIT_STOPPED)
                raise JobOverError(command.code)
            if command.kind == "stop":
                self.stop = True
            elif command.kind == "generation":
                self.newest = command
            elif command.generation == self.joined:
                self.regroup = command


class Rendezvous(RendezvousHandler):
    """Groups as the launcher announces them."""

    def __init__(self, commands: ReceivedCommands, spec: Spec, address: str) -> None:
        self._commands, self._spec, self._address = commands, spec, address

    def get_backend(self) -> str:
        return "lumina"

    def get_run_id(self) -> str:
        return self._spec.job

    def next_rendezvous(self) -> RendezvousInfo:
        commands = self._commands
        commands.control.report("ready", after=commands.joined)
        while True:
            commands.poll()
            command = commands.newest
            if command.generation > commands.joined and commands.control.index in command.members:
                break
            time.sleep(POLL)
        commands.joined, commands.regroup = command.generation, None
        os.environ[FIRST_WORLD] = str(command.first_world)  # the ranks inherit it
        store = PrefixStore(f"generation/{command.generation}", commands.control.store)
        rank = command.members.index(commands.control.index)
        meeting = RendezvousStoreInfo.build(rank, store, self._address)
        return RendezvousInfo(store, rank, len(command.members), meeting)

    def num_nodes_waiting(self) -> int:
        """Torch's agent restarts its ranks when this is not 0: when the launcher wants another group."""
        return int(self._commands.regroup is not None)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True


class NodeAgent(RankAgent):
    """torch's agent with the launcher's commands in its monitoring, and failures reported to the launcher."""

    def __init__(self, worker_spec: WorkerSpec, commands: ReceivedCommands, spec: Spec, logs: str) -> None:
        super().__init__(
            worker_spec,
            DefaultLogsSpecs(log_dir=logs),
            exit_barrier_timeout=0.0,
            shutdown_timeout=int(spec.stop_timeout),
        )
        self._commands, self._spec = commands, spec
        self._told_to_stop = False
        self._oom_kills = oom_kills()

    def codes(self) -> list[int | None]:
        """The ranks' exit codes, None for one that runs."""
        return [process.poll() for process in self.processes()]

    def look(self, worker_group: WorkerGroup) -> RunResult:
        self._commands.poll()
        if self._commands.stop and not self._told_to_stop:
            self._told_to_stop = True
            self.signal_ranks(signal.SIGTERM)
        result = super().look(worker_group)
        if result.state == WorkerState.FAILED:
            codes = {failure.exitcode for failure in result.failures.values()}
            if EXIT_STOPPED in codes:
                self._commands.control.report("stopped", generation=self._commands.joined)
                raise JobOverError(EXIT_STOPPED)
            if codes != {EXIT_RESIZE}:
                failures = [self._describe(rank, failure) for rank, failure in result.failures.items()]
                records = [failure.record() for failure in failures]
                self._commands.control.report("failed", generation=self._commands.joined, failures=records)
                if codes == {USER_ERROR}:
                    raise JobOverError(USER_ERROR)
        return result

    def signal_ranks(self, number: signal.Signals) -> None:
        for process in self.processes():
            if process.poll() is None:
                process.send_signal(number)

    def _describe(self, rank: int, failure: ProcessFailure) -> Failure:
        data: Any = failure.error_file_data.get("message")
        known = isinstance(data, dict)
        killed = failure.exitcode == -signal.SIGKILL and oom_kills() > self._oom_kills
        self._oom_kills = oom_kills()
        return Failure(
            host=self._spec.node,
            rank=rank,
            local_rank=failure.local_rank,
            pid=failure.pid,
            exitcode=failure.exitcode,
            message=str(data.get("message", "")) if known else "",
            traceback=str(data.get("extraInfo", {}).get("py_callstack", "")) if known else "",
            time=float(failure.timestamp or time.time()),
            out_of_memory=killed,
        )

    def stop_ranks(self) -> None:
        """Ranks whose group is broken can only be ended. When a node joins, they save first and lose no step."""
        command = self._commands.regroup
        if command is not None and command.reason == "joined":
            self.end_ranks(signal.SIGUSR2, timeout=int(self._spec.stop_timeout) + 10)
        else:
            self.end_ranks(signal.SIGKILL, timeout=10)

    def end_ranks(self, number: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        if self._commands.failed:
            number = signal.SIGKILL
        super().end_ranks(number, timeout)
        _end_children()

    def await_others(self) -> None:
        """Blocks until the launcher closes the job, once every node has succeeded; replaces torch's exit barrier."""
        self._commands.control.report("succeeded", generation=self._commands.joined)
        while True:
            self._commands.poll()
            time.sleep(POLL)


def _end_children() -> None:
    """Nothing that this agent or a rank of it started stays behind."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
