"""Agent of an elastic job on one node: torch's elastic agent, in groups that the launcher decides.

torch.distributed.elastic starts, watches and ends the node's ranks. Two things are ours: the rendezvous, because the
launcher knows at once which nodes are there (torch's own waits for heartbeats compared by the nodes' clocks), and what
the ranks' exit codes mean: 75 is a run that saved because it was asked to stop, 76 one that saved to go on at another
size, anything else but 0 a failure. `python -m lumina.cluster.elastic.agent SPEC` is what the launcher starts.
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

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing.api import SignalException

from lumina.cluster import topology
from lumina.cluster.elastic.control import AgentControl, connect
from lumina.cluster.elastic.node_agent import POLL, JobOverError, NodeAgent, ReceivedCommands, Rendezvous
from lumina.cluster.hangup import outliving_readers, without_ignored_hangup
from lumina.cluster.signals import EXIT_STOPPED, EXITS_UNSAVED, STOP_SIGNALS
from lumina.cluster.transport import Spec
from lumina.terminal import say

_HEARTBEAT = 1.0  # seconds between heartbeats
_PR_SET_CHILD_SUBREAPER = 36
_FOREVER = 1_000_000  # the launcher counts restarts, not the agents


class Heartbeat(threading.Thread):
    """Heartbeat of this agent in the launcher's store. Ends the agent when it is fenced, or the launcher is gone."""

    def __init__(self, spec: Spec, index: int) -> None:
        super().__init__(name="lumina-heartbeat", daemon=True)
        self._spec, self._index = spec, index
        self._store = connect(spec.store, spec.job, timedelta(seconds=10))

    def run(self) -> None:
        while True:
            try:
                self._store.add(f"heartbeat/{self._index}", 1)
                fenced = self._store.check([f"fenced/{self._index}"])
            except Exception as error:
                _say(f"agent on {self._spec.node}: the launcher is gone ({error})")
                break
            if fenced:
                _say(f"agent on {self._spec.node}: taken for dead and replaced; ending")
                os._exit(1)  # the kernel ends the ranks with it
            time.sleep(_HEARTBEAT)
        os.kill(os.getpid(), signal.SIGTERM)  # the ranks save if they still can
        time.sleep(self._spec.stop_timeout + 15)
        os._exit(1)


def _say(text: str) -> None:
    with suppress(OSError):  # whoever gave the agent up has closed its standard error too; it ends all the same
        say(text, file=sys.stderr, flush=True)


def _raise(number: int, frame: object) -> None:
    raise SignalException(f"got {signal.Signals(number).name}", signal.Signals(number))


def run(spec: Spec) -> int:
    """Take part in a job until it is over; returns the exit code."""
    _adopt()
    signals = without_ignored_hangup(STOP_SIGNALS)
    for number in signals:
        signal.signal(number, _raise)
    os.environ.update(spec.environment)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in signals)
    os.environ["LUMINA_AGENT"] = spec.node
    os.environ["LUMINA_JOB"] = spec.job
    here = topology.read()
    interface = topology.choose_interface(here, spec.store.rpartition(":")[0])
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface.name)
    os.environ["LUMINA_BIND"] = "1" if spec.bind else "0"
    control = AgentControl(
        connect(spec.store, spec.job),
        {
            "node": spec.node,
            "host": socket.gethostname(),
            "machine": topology.machine_identity(),
            "pid": os.getpid(),
            "topology": here.summary(interface),
        },
    )
    Heartbeat(spec, control.index).start()
    commands = ReceivedCommands(control)
    with tempfile.TemporaryDirectory(prefix="lumina-agent-") as logs:
        agent = NodeAgent(
            WorkerSpec(
                role="rank",
                local_world_size=spec.slots,
                entrypoint=spec.command[0],
                args=tuple(spec.command[1:]),
                rdzv_handler=Rendezvous(commands, spec, interface.address),
                max_restarts=_FOREVER,
                monitor_interval=POLL,
                local_addr=interface.address,
            ),
            commands,
            spec,
            logs,
        )
        return _until_over(agent, control, spec)


def _until_over(agent: NodeAgent, control: AgentControl, spec: Spec) -> int:
    code = 1
    try:
        agent.run()
    except JobOverError as over:
        code = over.code
    except SignalException as caught:
        agent.end_ranks(caught.sigval, timeout=int(spec.stop_timeout) + 10)
        code = exit_code(caught.sigval, {code for code in agent.codes() if code is not None})
        _try_to_report(control, code)
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        agent.end_ranks(signal.SIGTERM if code == EXIT_STOPPED else signal.SIGKILL, timeout=int(spec.stop_timeout))
    return code


def exit_code(number: int, ranks: set[int]) -> int:
    """The code of an agent that was sent a signal, from those of its ranks. A rank that the signal itself ended had not
    begun to train: there was nothing to save, and this is not 75."""
    if not ranks <= {EXIT_STOPPED, *EXITS_UNSAVED, *(-one for one in STOP_SIGNALS)}:
        return 1
    return EXIT_STOPPED if EXIT_STOPPED in ranks else 128 + number


def _try_to_report(control: AgentControl, code: int) -> None:
    with suppress(Exception):  # the launcher is gone, or sees this agent's exit code
        if code == 1:
            control.report("failed", generation=0, failures=[])
        else:
            control.report("stopped", generation=0, code=code)


def _adopt() -> None:
    """Become the subreaper of what ranks start, so that orphans of theirs can be ended (Linux, prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main() -> int:
    given = sys.argv[1]
    spec = Spec.load(sys.stdin.readline() if given == "-" else given)
    os.chdir(spec.folder)
    try:
        with outliving_readers():
            return run(spec)
    except Exception as error:
        _say(f"agent on {spec.node}: {type(error).__name__}: {error}")
        return 1


if __name__ == "__main__":
    code = main()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
