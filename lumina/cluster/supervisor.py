"""The launcher's part of an elastic job: it starts an agent on every node, forms groups, and decides what a loss means.

It alone decides. A node is lost when its agent's command ends, when its heart stops beating, or when it does not come
to a new group in time; the others are told at once, go on from the newest checkpoint without it, and the lost one is
tried again every few seconds. The job ends when every node has succeeded, when it was asked to stop, when the ranks
have failed too often, or when too few nodes are left for too long. Whatever happens, no process stays on any node, and
the exit code says what happened: 0, 75 (saved and stopped: start it again to go on), 2 (a user's mistake), 1.
"""

from __future__ import annotations

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

from lumina.cluster.board import LauncherBoard, Order
from lumina.cluster.failures import USER_ERROR, Failure, first_cause
from lumina.cluster.hostfile import Host
from lumina.cluster.signals import EXIT_HUNG, EXIT_STOPPED
from lumina.cluster.topology import rank_map
from lumina.cluster.transport import Spec, launcher_environment, with_spec

_POLL = 0.1
_LISTEN = 1.0  # seconds between looks at the heartbeats: one store operation for each node
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
class Place:
    """A node as the launcher sees it."""

    host: Host
    command: list[str]
    channel: subprocess.Popen[str] | None = None
    agent: int | None = None
    ready: bool = False  # waits for a group
    beats: int = 0
    beaten: float = 0.0  # time.monotonic() of the last beat
    again: float = 0.0  # when to try it again
    attempts: int = 0


@dataclass
class _Trouble:
    since: float
    failures: list[Failure] = field(default_factory=list)
    agents: set[int] = field(default_factory=set)


class Supervisor:
    """Runs one job to its end. `say` prints a line for the user."""

    def __init__(
        self,
        hosts: list[tuple[Host, list[str]]],
        make_spec: Callable[[Host], Spec],
        board: LauncherBoard,
        limits: Limits,
        say: Callable[[str], None],
    ) -> None:
        self.places = [Place(host, command) for host, command in hosts]
        self._make_spec, self.board, self.limits, self.say = make_spec, board, limits, say
        self.round = 0
        self.members: list[Place] = []
        self.running = False
        self.restarts = 0
        self.succeeded: set[int] = set()
        self._trouble: _Trouble | None = None
        self._gathering = self._short = time.monotonic()
        self._listened = 0.0
        self._stop: str | None = None
        self._over: int | None = None

    # --- The loop ---

    def run(self) -> int:
        """Returns the exit code. Nothing that was started outlives the call."""
        old = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
        told = False
        try:
            while self._over is None:
                self._start_places()
                self._hear()
                self._check_places()
                if self._stop is not None and not told:
                    told = True
                    self.say(f"{self._stop}: every rank saves and stops")
                    self.board.order(Order("stop"))
                    if not self.running:
                        self._end(EXIT_STOPPED)
                if self._over is None:
                    self._decide()
                time.sleep(_POLL)
            return self._over
        finally:
            self._close(self._over if self._over is not None else 1)
            for number, handler in old.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stop = signal.Signals(number).name

    def _start_places(self) -> None:
        if self._stop is not None:
            return
        now = time.monotonic()
        for place in self.places:
            if place.channel is None and now >= place.again:
                command, text = with_spec(place.command, self._make_spec(place.host))
                place.channel = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    text=True,
                    env=launcher_environment(),
                    start_new_session=True,  # Ctrl-C is for the launcher, which passes it on in good order
                )
                assert place.channel.stdin is not None
                with suppress(BrokenPipeError):  # it has ended already: seen when the places are checked
                    place.channel.stdin.write(text)
                    place.channel.stdin.flush()
                place.attempts += 1
                place.agent, place.ready, place.beaten = None, False, now

    def _hear(self) -> None:
        by_agent = {place.agent: place for place in self.places if place.agent is not None}
        for event in self.board.events():
            kind, agent = event["kind"], event["agent"]
            if kind == "hello":
                place = next((p for p in self.places if p.host.name == event["node"] and p.channel is not None), None)
                if place is None or place.agent is not None:
                    self.board.fence(agent)  # of an attempt that was given up
                    continue
                place.agent, place.beats, place.beaten = agent, 0, time.monotonic()
                by_agent[agent] = place
                self.say(f"{place.host.name}: {event['topology']}")
            elif agent in by_agent:
                self._hear_of(by_agent[agent], event)

    def _hear_of(self, place: Place, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "ready":
            place.ready = True
        elif kind == "succeeded":
            self.succeeded.add(event["agent"])
        elif kind == "stopped":
            self._stop = self._stop or f"a rank on {place.host.name} was asked to stop"
            self._end(EXIT_STOPPED)
        elif kind == "failed" and self._stop is not None and _only_signalled(event["failures"]):
            self._end(EXIT_STOPPED)  # it had not begun to train, so there was nothing to save
        elif kind == "failed" and event["round"] == self.round and self.running:
            self._trouble = self._trouble or _Trouble(time.monotonic())
            self._trouble.failures += [Failure(**values) for values in event["failures"]]
            self._trouble.agents.add(event["agent"])

    def _check_places(self) -> None:
        now = time.monotonic()
        listen = now - self._listened >= _LISTEN
        self._listened = now if listen else self._listened
        for place in self.places:
            if place.channel is None:
                continue
            code = place.channel.poll()
            if code is not None:
                self._ended(place, code)
            elif place.agent is not None and listen:
                beats = self.board.beats(place.agent)
                if beats != place.beats:
                    place.beats, place.beaten = beats, now
                elif now - place.beaten > self.limits.node_timeout:
                    self._lose(place, f"no heartbeat for {now - place.beaten:.0f} s")
            elif place.agent is None and now - place.beaten > self.limits.start_timeout:
                self._lose(place, f"its agent did not start within {self.limits.start_timeout:.0f} s")

    def _ended(self, place: Place, code: int) -> None:
        if code == EXIT_STOPPED and place in self.members:
            self._stop = self._stop or f"the agent on {place.host.name} was asked to stop"
            self._end(EXIT_STOPPED)
        elif code == USER_ERROR:
            self._end(USER_ERROR)
        else:
            self._lose(place, f"its command ended with exit code {code}")

    # --- Decisions ---

    def _lose(self, place: Place, why: str) -> None:
        """Give a node up for now; tried again later."""
        if place.agent is not None:
            self.board.fence(place.agent)
        _kill(place)
        if place.attempts == 1 or place in self.members or place.ready:
            self.say(f"{place.host.name} is lost: {why}")
        was_member = place in self.members and self.running
        place.channel, place.agent, place.ready = None, None, False
        place.again = time.monotonic() + self.limits.retry
        if was_member:
            if self._trouble is None and self.limits.min_nodes == len(self.places) and self.limits.max_restarts == 0:
                self.say(f"{place.host.name} was needed (--min-nodes {self.limits.min_nodes}, --max-restarts 0)")
                self._end(1)
                return
            self._trouble = None
            self._regroup(f"{place.host.name} is lost")

    def _decide(self) -> None:
        if not self.running:
            self._form_group()
        elif self._trouble is not None:
            self._judge(self._trouble)
        elif self.succeeded >= {place.agent for place in self.members}:
            self._end(0)
        elif self._stop is None and not self.succeeded and any(p.ready and p not in self.members for p in self.places):
            self._regroup("joined")

    def _judge(self, trouble: _Trouble) -> None:
        """Once the reports of a failure are in: again from the newest checkpoint, or the end."""
        hung = any(f.exitcode == EXIT_HUNG for f in trouble.failures)
        everyone = trouble.agents >= {place.agent for place in self.members}
        if time.monotonic() - trouble.since < (_HUNG_GRACE if hung else _GRACE) and not everyone:
            return
        cause = first_cause(trouble.failures) if trouble.failures else None
        text = cause.line() if cause else "an agent failed"
        if cause is not None and cause.is_effect and not everyone:
            silent = [place.host.name for place in self.members if place.agent not in trouble.agents]
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
        self._trouble = None

    def _regroup(self, reason: str) -> None:
        self.say(f"new group: {reason}")
        self.board.order(Order("regroup", self.round, reason=reason))
        self.running = False
        self._gathering = self._short = time.monotonic()

    def _form_group(self) -> None:
        now = time.monotonic()
        alive = [place for place in self.places if place.agent is not None]
        ready = [place for place in alive if place.ready]
        waited = now - self._gathering
        patience = self.limits.start_timeout if self.round == 0 else self.limits.last_call
        for place in alive:
            if not place.ready and waited > self.limits.stop_timeout + 30:
                self._lose(place, "it did not come to the new group")
        enough = len(ready) >= self.limits.min_nodes
        # Not by a single miss: a node that is just being started again may be here within the last call.
        if len(ready) == len(self.places) or (enough and len(ready) == len(alive) and waited > patience):
            self._open(ready)
        elif enough:
            self._short = now
        elif now - self._short > (self.limits.start_timeout if self.round == 0 else self.limits.node_wait):
            absent = ", ".join(place.host.name for place in self.places if place not in ready)
            self.say(
                f"FAILED: for {now - self._short:.0f} s no agent on {absent}; --min-nodes {self.limits.min_nodes}. "
                "See: lumina check-environment --hostfile FILE"
            )
            self._end(1)

    def _open(self, ready: list[Place]) -> None:
        self.round += 1
        self.members, self.running, self._trouble = ready, True, None
        self.succeeded = set()
        for place in ready:
            place.ready = False
        self.say(f"group {self.round}: " + ", ".join(rank_map([(p.host.name, p.host.slots) for p in ready])))
        agents = tuple(place.agent for place in ready if place.agent is not None)
        self.board.order(Order("round", self.round, agents))

    def _end(self, code: int) -> None:
        if self._over is None:
            self._over = code

    def _close(self, code: int) -> None:
        """Have every agent end its ranks and itself; end those that do not."""
        self.board.order(Order("close", code=code))
        patience = self.limits.stop_timeout + 15 if code == EXIT_STOPPED else 15.0
        deadline = time.monotonic() + patience
        for place in self.places:
            if place.channel is not None and place.agent is not None:
                try:
                    place.channel.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self.say(f"{place.host.name}: its agent did not end in time")
            _kill(place)
        sys.stdout.flush()


def _only_signalled(failures: list[dict[str, Any]]) -> bool:
    return all(values["exitcode"] in (-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT) for values in failures)


def _kill(place: Place) -> None:
    if place.channel is None:
        return
    if place.channel.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(place.channel.pid, signal.SIGKILL)
    place.channel.wait()
    if place.channel.stdin is not None:
        with suppress(BrokenPipeError):
            place.channel.stdin.close()
