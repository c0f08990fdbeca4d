"""Control channel between the launcher and its agents, through the TCP store that the launcher holds.

Two append-only lists, `events` (agents to launcher) and `commands` (launcher to agents), and one heartbeat counter for
each agent. Everything is decided by the launcher, which alone knows all nodes; no clock of one machine is ever compared
with another's. Losing a worker node loses nothing here; losing the launcher's machine ends the job, to be started again
from outside (Slurm's requeue, systemd, a shell loop).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

from lumina.cluster.elastic.torch_store import PrefixStore, Store, TCPStore

Report = Literal["hello", "ready", "failed", "stopped", "succeeded"]

TIMEOUT = timedelta(seconds=20)  # one store operation; a cut cable is silent


@dataclass
class ControlCommand:
    """What the launcher has its agents do. generation: `members` form the group of ranks numbered `generation`, in
    this order; the job's first group had `first_world` ranks. regroup: leave that generation because of `reason`. stop:
    have the ranks save and end. close: the job is over, with exit code `code`."""

    kind: Literal["generation", "regroup", "stop", "close"]
    generation: int = 0
    members: tuple[int, ...] = ()
    first_world: int = 0
    reason: str = ""
    code: int = 0


def connect(endpoint: str, job: str, timeout: timedelta = TIMEOUT) -> Store:
    """An agent's own connection to the launcher's store."""
    host, _, port = endpoint.rpartition(":")
    return PrefixStore(f"lumina/{job}", TCPStore(host, int(port), is_master=False, timeout=timeout))


class AgentControl:
    """Control channel, an agent's end: its reports out, the launcher's commands in."""

    def __init__(self, store: Store, about: dict[str, Any]) -> None:
        self.store = store
        self.index = store.add("agents", 1) - 1
        self._read = 0
        self.report("hello", **about)

    def report(self, kind: Report, **values: Any) -> None:
        """Append to the events: a slot is claimed, so that no two agents write to one, and then filled."""
        slot = self.store.add("events/claimed", 1) - 1
        self.store.set(f"events/{slot}", json.dumps({"agent": self.index, "kind": kind, **values}))

    def commands(self) -> list[ControlCommand]:
        """Commands that have come since the last call."""
        count, found = self.store.add("commands", 0), []
        for slot in range(self._read, count):
            values = json.loads(self.store.get(f"commands/{slot}"))
            found.append(ControlCommand(**{**values, "members": tuple(values["members"])}))
        self._read = count
        return found


class LauncherControl:
    """Control channel, the launcher's end, which holds the store's server."""

    def __init__(self, job: str, port: int = 0, host: str = "0.0.0.0") -> None:
        self._server = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        self.port: int = self._server.port
        self.store = PrefixStore(f"lumina/{job}", self._server)
        self._read = self._given = self._missing = 0

    def events(self) -> list[dict[str, Any]]:
        """Events that have come since the last call. One that is claimed but not written yet is waited for next time:
        its agent may die in between, so later ones are not held up for longer than that."""
        count, found = self.store.add("events/claimed", 0), []
        while self._read < count:
            key = f"events/{self._read}"
            if not self.store.check([key]):
                self._missing += 1
                if self._missing < 50:
                    break
            else:
                found.append(json.loads(self.store.get(key)))
            self._missing = 0
            self._read += 1
        return found

    def send(self, command: ControlCommand) -> None:
        self.store.set(f"commands/{self._given}", json.dumps(asdict(command)))
        self._given += 1
        self.store.add("commands", 1)

    def heartbeats(self, agent: int) -> int:
        """Heartbeats counted from an agent."""
        return self.store.add(f"heartbeat/{agent}", 0)

    def fence(self, agent: int) -> None:
        """Fence an agent that is taken for dead: should it wake up, it ends itself."""
        self.store.set(f"fenced/{agent}", "1")
