"""Launcher and agents talk through a real TCP store on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumina.cluster import first_world
from lumina.cluster.elastic.control import AgentControl, ControlCommand, LauncherControl, connect
from lumina.cluster.elastic.node_agent import ReceivedCommands, Rendezvous
from lumina.cluster.transport import Spec


@pytest.fixture
def launcher() -> Iterator[LauncherControl]:
    control = LauncherControl("job", host="127.0.0.1")
    yield control
    del control


def agent(launcher: LauncherControl, node: str, job: str = "job") -> AgentControl:
    return AgentControl(connect(f"127.0.0.1:{launcher.port}", job), {"node": node})


def test_events_come_in_order_and_once(launcher: LauncherControl) -> None:
    assert launcher.events() == []
    n0, n1 = agent(launcher, "n0"), agent(launcher, "n1")
    assert (n0.index, n1.index) == (0, 1)
    n1.report("ready", after=0)
    n0.report("failed", generation=1, failures=[{"message": "a\nb, 'c' ü"}])
    assert launcher.events() == [
        {"agent": 0, "kind": "hello", "node": "n0"},
        {"agent": 1, "kind": "hello", "node": "n1"},
        {"agent": 1, "kind": "ready", "after": 0},
        {"agent": 0, "kind": "failed", "generation": 1, "failures": [{"message": "a\nb, 'c' ü"}]},
    ]
    assert launcher.events() == []
    n0.report("succeeded", generation=1)
    assert [event["kind"] for event in launcher.events()] == ["succeeded"]


def test_ranks_hear_how_many_there_were_at_first(launcher: LauncherControl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of an agent that was not there then."""
    monkeypatch.setenv("LUMINA_FIRST_WORLD", "0")  # which is put back to what it was, whatever is set below
    monkeypatch.delenv("LUMINA_FIRST_WORLD")
    assert first_world() is None
    late = agent(launcher, "n0")
    launcher.send(ControlCommand("generation", 2, (late.index,), 4))
    spec = Spec(f"127.0.0.1:{launcher.port}", "job", "n0", 1, ["true"], {}, "/")
    assert Rendezvous(ReceivedCommands(late), spec, "127.0.0.1").next_rendezvous().world_size == 1
    assert first_world() == 4, "as the ranks inherit it"


def test_orders_reach_every_agent_once(launcher: LauncherControl) -> None:
    early = agent(launcher, "n0")
    commands = [
        ControlCommand("generation", 1, (0, 1), 2),
        ControlCommand("regroup", 1, reason="n1 is lost"),
        ControlCommand("close", code=75),
    ]
    for command in commands[:2]:
        launcher.send(command)
    assert early.commands() == commands[:2]
    assert early.commands() == []
    launcher.send(commands[2])
    assert early.commands() == commands[2:]
    assert agent(launcher, "n1").commands() == commands, "one that comes late hears of all"


def test_heartbeats_are_counted(launcher: LauncherControl) -> None:
    n0 = agent(launcher, "n0")
    assert launcher.heartbeats(n0.index) == 0
    for _ in range(3):
        n0.store.add(f"heartbeat/{n0.index}", 1)
    assert launcher.heartbeats(n0.index) == 3
    assert launcher.heartbeats(n0.index) == 3, "looking is no heartbeat"


def test_a_fence_is_for_one_agent(launcher: LauncherControl) -> None:
    n0, n1 = agent(launcher, "n0"), agent(launcher, "n1")
    launcher.fence(n0.index)
    assert n0.store.check(["fenced/0"])
    assert not n1.store.check(["fenced/1"])


def test_a_fenced_agent_ends_though_nobody_hears_it_any_more(launcher: LauncherControl, tmp_path: Path) -> None:
    spec = Spec(f"127.0.0.1:{launcher.port}", "job", "n0", 1, ["sleep", "1000"], {}, str(tmp_path))
    heard, said = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "lumina.cluster.elastic.agent", "-"], stdin=subprocess.PIPE, stdout=said, stderr=said
    )
    os.close(said)
    try:
        assert process.stdin is not None
        process.stdin.write(spec.dump().encode() + b"\n")
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not launcher.events():
            assert time.monotonic() < deadline, "the agent does not start"
            time.sleep(0.05)
        os.close(heard)  # as when ssh is gone
        launcher.fence(0)
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def test_an_agent_that_dies_in_the_middle_of_telling_holds_nobody_up(launcher: LauncherControl) -> None:
    n0, n1 = agent(launcher, "n0"), agent(launcher, "n1")
    launcher.events()
    n0.store.add("events/claimed", 1)  # and it is gone
    n1.report("ready", after=0)
    calls = 1
    while not (found := launcher.events()):
        calls += 1
        assert calls < 1000, "later events are held up for ever"
    assert calls > 1, "it is given the time to write"
    assert found == [{"agent": 1, "kind": "ready", "after": 0}]
    n1.report("stopped", generation=1)
    assert [event["kind"] for event in launcher.events()] == ["stopped"], "the gap costs once"


def test_a_slow_writer_is_waited_for(launcher: LauncherControl) -> None:
    n0, n1 = agent(launcher, "n0"), agent(launcher, "n1")
    launcher.events()
    place = n0.store.add("events/claimed", 1) - 1
    n1.report("ready", after=0)
    assert launcher.events() == []
    n0.store.set(f"events/{place}", '{"agent": 0, "kind": "failed"}')
    assert [event["kind"] for event in launcher.events()] == ["failed", "ready"]


def test_two_jobs_do_not_hear_each_other(launcher: LauncherControl) -> None:
    agent(launcher, "n0", job="another")
    assert launcher.events() == []
