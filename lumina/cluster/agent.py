"""The agent on a node: torch's elastic agent, in groups that the launcher decides.

torch.distributed.elastic starts, watches and ends the node's ranks. Two things are ours: the rendezvous, because the
launcher knows at once which nodes are there (torch's own waits for heartbeats compared by the nodes' clocks), and what
the ranks' exit codes mean: 75 is a run that saved because it was asked to stop, 76 one that saved to go on at another
size, anything else but 0 a failure. `python -m lumina.cluster.agent SPEC` is what the launcher starts.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from lumina.cluster import topology
from lumina.cluster.board import AgentBoard, Order, connect
from lumina.cluster.failures import USER_ERROR, Failure, oom_kills
from lumina.cluster.signals import EXIT_RESIZE, EXIT_STOPPED
from lumina.cluster.torch_agent import RankAgent
from lumina.cluster.torch_store import PrefixStore
from lumina.cluster.transport import Spec

_POLL = 0.2  # seconds between looks at the ranks and the orders
_BEAT = 1.0  # seconds between heartbeats
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_CHILD_SUBREAPER = 36
_FOREVER = 1_000_000  # the launcher counts restarts, not the agents


class JobOverError(Exception):
    """The job is over for this agent."""

    def __init__(self, code: int) -> None:
        super().__init__(f"over with exit code {code}")
        self.code = code


class Orders:
    """The launcher's orders as this agent has understood them so far."""

    def __init__(self, board: AgentBoard) -> None:
        self.board = board
        self.joined = 0  # the round this agent's ranks belong to
        self.newest = Order("round")
        self.regroup: Order | None = None
        self.stop = False
        self.failed = False  # the job was closed as a failure: nothing is left to save

    def poll(self) -> None:
        """Read new orders. Raises JobOverError when the job is closed."""
        for order in self.board.orders():
            if order.kind == "close":
                self.failed = order.code not in (0, EXIT_STOPPED)
                raise JobOverError(order.code)
            if order.kind == "stop":
                self.stop = True
            elif order.kind == "round":
                self.newest = order
            elif order.round == self.joined:
                self.regroup = order


class Rendezvous(RendezvousHandler):
    """Groups as the launcher announces them."""

    def __init__(self, orders: Orders, spec: Spec, address: str) -> None:
        self._orders, self._spec, self._address = orders, spec, address

    def get_backend(self) -> str:
        return "lumina"

    def get_run_id(self) -> str:
        return self._spec.job

    def next_rendezvous(self) -> RendezvousInfo:
        orders = self._orders
        orders.board.tell("ready", after=orders.joined)
        while True:
            orders.poll()
            order = orders.newest
            if order.round > orders.joined and orders.board.index in order.members:
                break
            time.sleep(_POLL)
        orders.joined, orders.regroup = order.round, None
        store = PrefixStore(f"round/{order.round}", orders.board.store)
        rank = order.members.index(orders.board.index)
        meeting = RendezvousStoreInfo.build(rank, store, self._address)
        return RendezvousInfo(store, rank, len(order.members), meeting)

    def num_nodes_waiting(self) -> int:
        """Torch's agent restarts its ranks when this is not 0: when the launcher wants another group."""
        return int(self._orders.regroup is not None)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True


class Agent(RankAgent):
    """torch's agent with the launcher's orders in its monitoring, and failures reported to the launcher."""

    def __init__(self, worker_spec: WorkerSpec, orders: Orders, spec: Spec, logs: str) -> None:
        super().__init__(
            worker_spec,
            DefaultLogsSpecs(log_dir=logs),
            exit_barrier_timeout=0.0,
            shutdown_timeout=int(spec.stop_timeout),
        )
        self._orders, self._spec = orders, spec
        self._told_to_stop = False
        self._oom_kills = oom_kills()

    def codes(self) -> list[int | None]:
        """The ranks' exit codes, None for one that runs."""
        return [process.poll() for process in self.processes()]

    def look(self, worker_group: WorkerGroup) -> RunResult:
        self._orders.poll()
        if self._orders.stop and not self._told_to_stop:
            self._told_to_stop = True
            self.signal_ranks(signal.SIGTERM)
        result = super().look(worker_group)
        if result.state == WorkerState.FAILED:
            codes = {failure.exitcode for failure in result.failures.values()}
            if EXIT_STOPPED in codes:
                self._orders.board.tell("stopped", round=self._orders.joined)
                raise JobOverError(EXIT_STOPPED)
            if codes != {EXIT_RESIZE}:
                failures = [self._describe(rank, failure) for rank, failure in result.failures.items()]
                records = [failure.record() for failure in failures]
                self._orders.board.tell("failed", round=self._orders.joined, failures=records)
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
        order = self._orders.regroup
        if order is not None and order.reason == "joined":
            self.end_ranks(signal.SIGUSR2, timeout=int(self._spec.stop_timeout) + 10)
        else:
            self.end_ranks(signal.SIGKILL, timeout=10)

    def end_ranks(self, number: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        if self._orders.failed:
            number = signal.SIGKILL
        super().end_ranks(number, timeout)
        _end_children()

    def await_others(self) -> None:
        """Blocks until the launcher closes the job, once every node has succeeded; replaces torch's exit barrier."""
        self._orders.board.tell("succeeded", round=self._orders.joined)
        while True:
            self._orders.poll()
            time.sleep(_POLL)


class Heart(threading.Thread):
    """Beats for the launcher. Ends the agent when it is fenced off, or when the launcher is gone."""

    def __init__(self, spec: Spec, index: int) -> None:
        super().__init__(name="lumina-heart", daemon=True)
        self._spec, self._index = spec, index
        self._store = connect(spec.store, spec.job, timedelta(seconds=10))

    def run(self) -> None:
        while True:
            try:
                self._store.add(f"beat/{self._index}", 1)
                fenced = self._store.check([f"fenced/{self._index}"])
            except Exception as error:
                _say(f"agent on {self._spec.node}: the launcher is gone ({error})")
                break
            if fenced:
                _say(f"agent on {self._spec.node}: taken for dead and replaced; ending")
                os._exit(1)  # the kernel ends the ranks with it
            time.sleep(_BEAT)
        os.kill(os.getpid(), signal.SIGTERM)  # the ranks save if they still can
        time.sleep(self._spec.stop_timeout + 15)
        os._exit(1)


def _say(text: str) -> None:
    with suppress(OSError):  # whoever gave the agent up has closed its standard error too; it ends all the same
        print(text, file=sys.stderr, flush=True)


def _raise(number: int, frame: object) -> None:
    raise SignalException(f"got {signal.Signals(number).name}", signal.Signals(number))


def run(spec: Spec) -> int:
    """Take part in a job until it is over; returns the exit code."""
    _adopt()
    for number in _SIGNALS:
        signal.signal(number, _raise)
    os.environ.update(spec.environment)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in _SIGNALS)
    os.environ["LUMINA_AGENT"] = spec.node
    os.environ["LUMINA_JOB"] = spec.job
    here = topology.read()
    interface = topology.choose_interface(here, spec.store.rpartition(":")[0])
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface.name)
    os.environ["LUMINA_BIND"] = "1" if spec.bind else "0"
    board = AgentBoard(
        connect(spec.store, spec.job),
        {"node": spec.node, "host": socket.gethostname(), "pid": os.getpid(), "topology": here.summary(interface)},
    )
    Heart(spec, board.index).start()
    orders = Orders(board)
    with tempfile.TemporaryDirectory(prefix="lumina-agent-") as logs:
        agent = Agent(
            WorkerSpec(
                role="rank",
                local_world_size=spec.slots,
                entrypoint=spec.command[0],
                args=tuple(spec.command[1:]),
                rdzv_handler=Rendezvous(orders, spec, interface.address),
                max_restarts=_FOREVER,
                monitor_interval=_POLL,
                local_addr=interface.address,
            ),
            orders,
            spec,
            logs,
        )
        return _until_over(agent, board, spec)


def _until_over(agent: Agent, board: AgentBoard, spec: Spec) -> int:
    code = 1
    try:
        agent.run()
    except JobOverError as over:
        code = over.code
    except SignalException as caught:
        agent.end_ranks(caught.sigval, timeout=int(spec.stop_timeout) + 10)
        # A rank that the signal itself ended had not begun to train: there was nothing to save.
        ended = {EXIT_STOPPED, *(-number for number in _SIGNALS)}
        stopped = ended >= {code for code in agent.codes() if code is not None}
        code = EXIT_STOPPED if stopped else 1
        _try_to_tell(board, "stopped" if stopped else "failed")
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        agent.end_ranks(signal.SIGTERM if code == EXIT_STOPPED else signal.SIGKILL, timeout=int(spec.stop_timeout))
    return code


def _try_to_tell(board: AgentBoard, kind: Any) -> None:
    with suppress(Exception):  # the launcher is gone, or sees this agent's exit code
        board.tell(kind, round=0, failures=[])


def _adopt() -> None:
    """What a rank started becomes this process's child when the rank dies, and can be ended (Linux, prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_children() -> None:
    """Nothing that this agent or a rank of it started stays behind."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def main() -> int:
    given = sys.argv[1]
    spec = Spec.load(sys.stdin.readline() if given == "-" else given)
    os.chdir(spec.folder)
    try:
        return run(spec)
    except Exception as error:
        _say(f"agent on {spec.node}: {type(error).__name__}: {error}")
        return 1


if __name__ == "__main__":
    code = main()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
