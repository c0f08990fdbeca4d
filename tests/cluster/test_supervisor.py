"""What the launcher decides when no agent ever comes, or it is told to stop before one does."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lumina.cluster.elastic.control import LauncherControl
from lumina.cluster.elastic.supervisor import Limits, Supervisor
from lumina.cluster.hostfile import Host
from lumina.cluster.signals import STOP_SIGNALS
from lumina.cluster.transport import Spec


def supervisor(command: list[str], said: list[str], **limits: float) -> Supervisor:
    spec = lambda host: Spec("127.0.0.1:1", "job", host.name, 1, ["true"], {}, "/")
    hosts = [(Host("n0", 1), command), (Host("n1", 1), command)]
    return Supervisor(hosts, spec, LauncherControl("job", host="127.0.0.1"), Limits(2, **limits), said.append)


@pytest.mark.parametrize("command", [["false"], ["sleep", "1000"]], ids=["ends at once", "says nothing"])
def test_nodes_that_never_come_are_named(command: list[str]) -> None:
    said: list[str] = []
    asked = supervisor(command, said, start_timeout=1.0, retry=0.2)
    assert asked.run() == 1
    assert "no agent on n0, n1" in said[-1]
    assert all(node.process is None or node.process.poll() is not None for node in asked.nodes)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_told_to_stop_before_anyone_came(number: signal.Signals) -> None:
    """Not 75: no checkpoint was saved."""
    said: list[str] = []
    asked = supervisor(["sleep", "1000"], said)
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    assert asked.run() == 128 + number
    assert said[-1].startswith(number.name)
    assert all(node.process is None or node.process.poll() is not None for node in asked.nodes)
