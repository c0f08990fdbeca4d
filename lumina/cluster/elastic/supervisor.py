"""Supervisor of an elastic job, in the launcher: starts an agent on every node, forms groups of ranks, handles losses.

It alone decides. A node is lost when its agent's command ends, when its heartbeat stops, or when it does not come
to a new group in time; the others are told at once, go on from the newest checkpoint without it, and the lost one is
tried again every few seconds. The job ends when every node has succeeded, when it was asked to stop, when the ranks
have failed too often, or when too few nodes are left for too long. Whatever happens, no process stays on any node, and
the exit code says what happened: 0, 75 (saved and stopped: start it again to go on), 128 and the signal's number (asked
to stop before there was anything to save), 2 (a user's mistake), 1.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from lumina.cluster.elastic.control import ControlCommand, LauncherControl
from lumina.cluster.elastic.failures import USER_ERROR, Failure, first_cause
from lumina.cluster.hangup import without_ignored_hangup
from lumina.cluster.hostfile import Host
from lumina.cluster.signals import EXIT_HUNG, EXIT_STOPPED, EXITS_UNSAVED, STOP_SIGNALS
from lumina.cluster.topology import rank_map
from lumina.cluster.transport import Spec, launcher_environment, with_spec
from lumina.processes import how_it_ended

_POLL = 0.1
_HEARTBEAT_READ = 1.0  # seconds between looks at the heartbeats: one store operation for each node
_GRACE = 1.5  # seconds in which the other ranks' reports of one failure come in
_HUNG_GRACE = 6.0  # the ranks of a hang notice it one after the other


@dataclass
class Limits:
    """min_nodes: fewest nodes to train on. max_restarts: failures of ranks to recover from (lost nodes do not count).
    Times in seconds: node_timeout without a heartbeat, start_timeout for the first group to be complete, last_call for
    a later one, retry between attempts to start a lost node, node_wait with too few nodes once the job has trained,
    stop_timeout for a save."""

    min_nodes: int
    max_restarts: int = 10
    node_timeout: float = 12.0
    start_timeout: float = 120.0
    last_call: float = 2.0
    retry: float = 5.0
    node_wait: float = 1800.0
    stop_timeout: float = 60.0


@dataclass
class NodeState:
    """One node, as the launcher knows it: its agent's process and number, heartbeats and attempts to start it."""

    host: Host
    command: list[str]
    process: subprocess.Popen[str] | None = None
    agent: int | None = None
    machine: str = ""  # of its newest agent, by topology.machine_identity
    ready: bool = False  # waits for a group
    heartbeats: int = 0
    last_heartbeat: float = 0.0  # time.monotonic()
    retry_at: float = 0.0  # time.monotonic()
    attempts: int = 0


@dataclass
class _PendingFailure:
    since: float
    failures: list[Failure] = field(default_factory=list)
    agents: set[int] = field(default_factory=set)


class Supervisor:
    """Runs one job to its end. `say` prints a line for the user."""

    def __init__(
        self,
        hosts: list[tuple[Host, list[str]]],
        make_spec: Callable[[Host], Spec],
        control: LauncherControl,
        limits: Limits,
        say: Callable[[str], None],
    ) -> None:
        self.nodes = [NodeState(host, command) for host, command in hosts]
        self._make_spec, self.control, self.limits, self.say = make_spec, control, limits, say
        self.generation = self.first_world = 0
        self.members: list[NodeState] = []
        self.running = False
        self.restarts = 0
        self.succeeded: set[int] = set()
        self._pending: _PendingFailure | None = None
        self._gathering_since = self._short_since = time.monotonic()
        self._heartbeats_read_at = 0.0
        self._stop: str | None = None
        self._unsaved = 128 + signal.SIGTERM  # the exit code where there was nothing to save
        self._saved = False  # whether the ranks save before they leave their group for a larger one
        self._exit_code: int | None = None

    # --- The loop ---

    def run(self) -> int:
        """Returns the exit code. Nothing that was started outlives the call."""
        old = {number: signal.signal(number, self._note) for number in without_ignored_hangup(STOP_SIGNALS)}
        asked_to_stop = False
        try:
            while self._exit_code is None:
                self._start_agents()
                self._read_events()
                self._check_nodes()
                if self._stop is not None and not asked_to_stop:
                    asked_to_stop = True
                    self.control.send(ControlCommand("stop"))
                    self.say(f"{self._stop}: every rank saves and stops")
                    if not self.running:
                        self._end(EXIT_STOPPED if self._saved else self._unsaved)
                if self._exit_code is None:
                    self._decide()
                time.sleep(_POLL)
            return self._exit_code
        finally:
            self._close(self._exit_code if self._exit_code is not None else 1)
            for number, handler in old.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stop, self._unsaved = signal.Signals(number).name, 128 + number

    def _start_agents(self) -> None:
        if self._stop is not None:
            return
        now = time.monotonic()
        for node in self.nodes:
            if node.process is None and now >= node.retry_at:
                command, text = with_spec(node.command, self._make_spec(node.host))
                node.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    text=True,
                    env=launcher_environment(),
                    start_new_session=True,  # Ctrl-C is for the launcher, which passes it on in good order
                )
                assert node.process.stdin is not None
                with suppress(BrokenPipeError):  # it has ended already: seen when the nodes are checked
                    node.process.stdin.write(text)
                    node.process.stdin.flush()
                node.attempts += 1
                node.agent, node.ready, node.last_heartbeat = None, False, now

    def _read_events(self) -> None:
        by_agent = {node.agent: node for node in self.nodes if node.agent is not None}
        for event in self.control.events():
            kind, agent = event["kind"], event["agent"]
            if kind == "hello":
                node = next((p for p in self.nodes if p.host.name == event["node"] and p.process is not None), None)
                if node is None or node.agent is not None:
                    self.control.fence(agent)  # of an attempt that was given up
                    continue
                if twin := next((p for p in self.nodes if p.agent is not None and p.machine == event["machine"]), None):
                    self._refuse_twin(node, twin, event["host"])
                    continue
                node.agent, node.heartbeats, node.last_heartbeat = agent, 0, time.monotonic()
                node.machine = event["machine"]
                by_agent[agent] = node
                self.say(f"{node.host.name}: {event['topology']}")
            elif agent in by_agent:
                self._take_event(by_agent[agent], event)

    def _refuse_twin(self, node: NodeState, twin: NodeState, host: str) -> None:
        """One machine under two names would have its cores and GPUs twice. A job that has trained goes on without."""
        then = "FAILED" if self.generation == 0 else f"WARNING: going on without {node.host.name}"
        names = f"{twin.host.name} and {node.host.name}"
        self.say(f"{then}: {names} are one machine ({host}). Name it once, with all of its ranks: NAME slots=N")
        if self.generation == 0:
            self._end(USER_ERROR)
        _kill_agent(node)
        node.process, node.retry_at = None, math.inf

    def _take_event(self, node: NodeState, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "ready":
            node.ready = True
        elif kind == "succeeded":
            self.succeeded.add(event["agent"])
        elif kind == "stopped":
            self._stop = self._stop or f"a rank on {node.host.name} was asked to stop"
            self._end(event.get("code", EXIT_STOPPED))
        elif kind == "failed" and self._stop is not None and not event["failures"]:  # its agent was signalled too
            self.say(f"FAILED: a rank on {node.host.name} failed when it was asked to stop")
            self._end(1)
        elif kind == "failed" and self._stop is not None and _only_signalled(event["failures"]):
            self._end(self._unsaved)  # it had not begun to train, so there was nothing to save
        elif kind == "failed" and event["generation"] == self.generation and self.running:
            self._pending = self._pending or _PendingFailure(time.monotonic())
            self._pending.failures += [Failure(**values) for values in event["failures"]]
            self._pending.agents.add(event["agent"])

    def _check_nodes(self) -> None:
        now = time.monotonic()
        due = now - self._heartbeats_read_at >= _HEARTBEAT_READ
        self._heartbeats_read_at = now if due else self._heartbeats_read_at
        for node in self.nodes:
            if node.process is None:
                continue
            code = node.process.poll()
            if code is not None:
                self._agent_ended(node, code)
            elif node.agent is not None and due:
                heartbeats = self.control.heartbeats(node.agent)
                if heartbeats != node.heartbeats:
                    node.heartbeats, node.last_heartbeat = heartbeats, now
                elif now - node.last_heartbeat > self.limits.node_timeout:
                    self._drop(node, f"no heartbeat for {now - node.last_heartbeat:.0f} s")
            elif node.agent is None and now - node.last_heartbeat > self.limits.start_timeout:
                self._drop(node, f"its agent did not start within {self.limits.start_timeout:.0f} s")

    def _agent_ended(self, node: NodeState, code: int) -> None:
        if code in (EXIT_STOPPED, *EXITS_UNSAVED) and node in self.members:
            self._stop = self._stop or f"the agent on {node.host.name} was asked to stop"
            self._end(code)
        elif code == USER_ERROR:
            self._end(USER_ERROR)
        else:
            self._drop(node, f"its command ended ({how_it_ended(code)})")

    # --- Decisions ---

    def _drop(self, node: NodeState, why: str) -> None:
        """Give a node up for now; tried again later."""
        if node.agent is not None:
            self.control.fence(node.agent)
        _kill_agent(node)
        if node.attempts == 1 or node in self.members or node.ready:
            self.say(f"{node.host.name} is lost: {why}")
        was_member = node in self.members and self.running
        node.process, node.agent, node.ready = None, None, False
        node.retry_at = time.monotonic() + self.limits.retry
        if was_member and self._stop is not None:
            self.say("not every rank has saved: the job goes on from its newest checkpoint when it is started again")
            self._end(self._unsaved)
        elif was_member:
            if self._pending is None and self.limits.min_nodes == len(self.nodes) and self.limits.max_restarts == 0:
                self.say(f"{node.host.name} was needed (--min-nodes {self.limits.min_nodes}, --max-restarts 0)")
                self._end(1)
                return
            self._pending = None
            self._regroup(f"{node.host.name} is lost")

    def _decide(self) -> None:
        if not self.running:
            self._form_group()
        elif self._pending is not None:
            self._handle_failure(self._pending)
        elif self.succeeded >= {node.agent for node in self.members}:
            self._end(0)
        elif self._stop is None and not self.succeeded and any(p.ready and p not in self.members for p in self.nodes):
            self._regroup("joined")

    def _handle_failure(self, pending: _PendingFailure) -> None:
        """Once the reports of a failure are in: again from the newest checkpoint, or the end."""
        hung = any(f.exitcode == EXIT_HUNG for f in pending.failures)
        everyone = pending.agents >= {node.agent for node in self.members}
        if time.monotonic() - pending.since < (_HUNG_GRACE if hung else _GRACE) and not everyone:
            return
        cause = first_cause(pending.failures) if pending.failures else None
        text = cause.line() if cause else "an agent failed"
        if cause is not None and cause.is_effect and not everyone:
            silent = [node.host.name for node in self.members if node.agent not in pending.agents]
            text += f"; no report from the ranks on {', '.join(silent)}, which may be stopped or stuck"
        if cause is not None and cause.exitcode == USER_ERROR:
            self._end(USER_ERROR)
        elif self.succeeded or self._stop is not None or self.restarts >= self.limits.max_restarts:
            used = f" after {self.restarts} restart(s)" if self.restarts else ""
            self.say(f"FAILED{used}. First failure: {text}")
            if cause is not None and cause.traceback:
                self.say(cause.traceback.rstrip())
            self._end(1)
        else:
            self.restarts += 1
            self.say(f"failure {self.restarts} of at most {self.limits.max_restarts}: {text}")
            self._regroup("failed")
        self._pending = None

    def _regroup(self, reason: str) -> None:
        self.say(f"new group: {reason}")
        self.control.send(ControlCommand("regroup", self.generation, reason=reason))
        self.running, self._saved = False, reason == "joined"
        self._gathering_since = self._short_since = time.monotonic()

    def _form_group(self) -> None:
        now = time.monotonic()
        alive = [node for node in self.nodes if node.agent is not None]
        ready = [node for node in alive if node.ready]
        waited = now - self._gathering_since
        patience = self.limits.start_timeout if self.generation == 0 else self.limits.last_call
        for node in alive:
            if not node.ready and waited > self.limits.stop_timeout + 30:
                self._drop(node, "it did not come to the new group")
        enough = len(ready) >= self.limits.min_nodes
        # Not by a single miss: a node that is just being started again may be here within the last call.
        if len(ready) == len(self.nodes) or (enough and len(ready) == len(alive) and waited > patience):
            self._start_generation(ready)
        elif enough:
            self._short_since = now
        elif now - self._short_since > (self.limits.start_timeout if self.generation == 0 else self.limits.node_wait):
            absent = ", ".join(node.host.name for node in self.nodes if node not in ready)
            self.say(
                f"FAILED: for {now - self._short_since:.0f} s no agent on {absent}; "
                f"--min-nodes {self.limits.min_nodes}. See: lumina check-environment --hostfile FILE"
            )
            self._end(1)

    def _start_generation(self, ready: list[NodeState]) -> None:
        self.generation += 1
        self.members, self.running, self._pending = ready, True, None
        self.succeeded = set()
        for node in ready:
            node.ready = False
        self.first_world = self.first_world or sum(node.host.slots for node in ready)
        self.say(f"group {self.generation}: " + ", ".join(rank_map([(p.host.name, p.host.slots) for p in ready])))
        agents = tuple(node.agent for node in ready if node.agent is not None)
        self.control.send(ControlCommand("generation", self.generation, agents, self.first_world))

    def _end(self, code: int) -> None:
        if self._exit_code is None:
            self._exit_code = code

    def _close(self, code: int) -> None:
        """Have every agent end its ranks and itself; end those that do not."""
        self.control.send(ControlCommand("close", code=code))
        patience = self.limits.stop_timeout + 15 if code == EXIT_STOPPED else 15.0
        deadline = time.monotonic() + patience
        for node in self.nodes:
            if node.process is not None and node.agent is not None:
                try:
                    node.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self.say(f"{node.host.name}: its agent did not end in time")
            _kill_agent(node)
        sys.stdout.flush()


def _only_signalled(failures: list[dict[str, Any]]) -> bool:
    ended = {*EXITS_UNSAVED, *(-number for number in STOP_SIGNALS)}
    return all(values["exitcode"] in ended for values in failures)


def _kill_agent(node: NodeState) -> None:
    if node.process is None:
        return
    if node.process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(node.process.pid, signal.SIGKILL)
    node.process.wait()
    if node.process.stdin is not None:
        with suppress(BrokenPipeError):
            node.process.stdin.close()
