"""What the launcher decides when no agent ever comes, and when it is told to stop before, between and in groups."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lumina.cluster.elastic.control import AgentControl, ControlCommand, LauncherControl, connect
from lumina.cluster.elastic.supervisor import Limits, Supervisor
from lumina.cluster.hostfile import Host
from lumina.cluster.signals import STOP_SIGNALS
from lumina.cluster.transport import Spec


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """SIGHUP as where the tests are not under nohup themselves."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def supervisor(command: list[str], said: list[str], *, min_nodes: int = 2, **limits: float) -> Supervisor:
    spec = lambda host: Spec("127.0.0.1:1", "job", host.name, 1, ["true"], {}, "/")
    hosts = [(Host("n0", 1), command), (Host("n1", 1), command)]
    return Supervisor(hosts, spec, LauncherControl("job", host="127.0.0.1"), Limits(min_nodes, **limits), said.append)


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
    asked, before = supervisor(["sleep", "1000"], said), signal.getsignal(number)

    def stop() -> None:
        """Once it is heeded, and the nodes' commands are started."""
        while signal.getsignal(number) is before or any(node.process is None for node in asked.nodes):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    assert asked.run() == 128 + number
    stopping.join()
    assert said[-1].startswith(number.name)
    assert all(node.process is None or node.process.poll() is not None for node in asked.nodes)


# --- With agents ---


def agent(asked: Supervisor, node: str, machine: str | None = None) -> AgentControl:
    """An agent's word: it is there, and ready for a group. Its process is a `sleep`."""
    about = {"node": node, "host": node, "machine": machine or node, "topology": "here"}
    control = AgentControl(connect(f"127.0.0.1:{asked.control.port}", "job"), about)
    control.report("ready", after=0)
    return control


def until(control: AgentControl, kind: str) -> ControlCommand:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for command in control.commands():
            if command.kind == kind:
                return command
        time.sleep(0.01)
    raise AssertionError(f"it was never told: {kind}")


def beside(asked: Supervisor, control: AgentControl, play: Callable[[], None]) -> tuple[int, int]:
    """The supervisor's exit code, with `play` in a thread beside it, and the one that it gave the agents."""
    told = []

    def playing() -> None:
        play()
        told.append(until(control, "close").code)
        for node in asked.nodes:
            if node.process is not None:
                node.process.kill()

    thread = threading.Thread(target=playing)
    thread.start()
    code = asked.run()
    thread.join()
    return code, told[0]


def alone(said: list[str]) -> tuple[Supervisor, AgentControl]:
    """Two nodes are wanted and one is enough, whose agent is there."""
    asked = supervisor(["sleep", "1000"], said, min_nodes=1, start_timeout=0.3, retry=0.0)
    return asked, agent(asked, "n0")


def both(said: list[str], min_nodes: int = 2, node_wait: float = 60.0) -> tuple[Supervisor, AgentControl]:
    """Two nodes, whose agents are there, and the first of these."""
    asked = supervisor(["sleep", "1000"], said, min_nodes=min_nodes, node_wait=node_wait)
    return asked, [agent(asked, "n0"), agent(asked, "n1")][0]


def tell(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_told_to_stop_while_the_ranks_save_for_a_larger_group() -> None:
    """75, and the agents are told so: they let their ranks save to the end."""
    said: list[str] = []
    asked, first = alone(said)

    def play() -> None:
        until(first, "generation")
        agent(asked, "n1")
        assert until(first, "regroup").reason == "joined"
        tell(signal.SIGTERM)

    assert beside(asked, first, play) == (75, 75), said


def test_a_later_group_is_told_how_many_ranks_the_first_had() -> None:
    said: list[str] = []
    asked = supervisor(["sleep", "1000"], said, min_nodes=1, last_call=0.1, retry=1000.0)
    first, _ = agent(asked, "n0"), agent(asked, "n1")
    worlds: list[tuple[int, int]] = []

    def play() -> None:
        command = until(first, "generation")
        worlds.append((len(command.members), command.first_world))
        process = asked.nodes[1].process
        assert process is not None
        process.kill()
        first.report("ready", after=1)
        command = until(first, "generation")
        worlds.append((len(command.members), command.first_world))
        tell(signal.SIGTERM)

    assert beside(asked, first, play)[0] == 128 + signal.SIGTERM, said
    assert worlds == [(2, 2), (1, 2)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_node_lost_while_the_job_stops_ends_it(number: signal.Signals) -> None:
    """No other group is formed, which would train on."""
    said: list[str] = []
    asked, first = both(said, min_nodes=1, node_wait=1.0)

    def play() -> None:
        until(first, "generation")
        tell(number)
        until(first, "stop")
        process = asked.nodes[1].process
        assert process is not None
        process.kill()

    assert beside(asked, first, play)[0] == 128 + number, said
    assert any("newest checkpoint" in line for line in said)


def test_a_rank_that_fails_when_it_is_asked_to_stop_is_a_failure() -> None:
    """Its agent was sent the signal too, as systemd sends it to a whole control group."""
    said: list[str] = []
    asked, first = both(said)

    def play() -> None:
        until(first, "generation")
        tell(signal.SIGTERM)
        until(first, "stop")
        first.report("failed", generation=0, failures=[])

    assert beside(asked, first, play)[0] == 1, said
    assert said[-1].startswith("FAILED")


def test_what_comes_with_a_second_name_of_a_machine_is_not_lost() -> None:
    said: list[str] = []
    asked, first = alone(said)

    def play() -> None:
        until(first, "generation")
        slot = first.store.add("events/claimed", 2) - 2  # the first is waited for: both are read at once
        done = {"agent": first.index, "kind": "succeeded", "generation": 1}
        first.store.set(f"events/{slot + 1}", json.dumps(done))
        twin = {"agent": 7, "kind": "hello", "node": "n1", "host": "n1", "machine": "n0", "topology": "here"}
        first.store.set(f"events/{slot}", json.dumps(twin))

    assert beside(asked, first, play)[0] == 0, said
    assert [line for line in said if line.startswith("WARNING: going on without n1: n0 and n1 are one machine")]
