"""What the launcher and its agents tell each other, through the TCP store that the launcher holds.

Two append-only lists, `events` (agents to launcher) and `orders` (launcher to agents), and one beating counter for each
agent. Everything is decided by the launcher, which alone knows all nodes; no clock of one machine is ever compared with
another's. Losing a worker node loses nothing here; losing the launcher's machine ends the job, to be started again
from outside (Slurm's requeue, systemd, a shell loop).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from lumina.cluster.torch_store import PrefixStore, Store, TCPStore

Answer = Literal["hello", "ready", "failed", "stopped", "succeeded"]

TIMEOUT = timedelta(seconds=20)  # one store operation; a cut cable is silent


@dataclass
class Order:
    """round: members form a group, in this order. regroup: leave round `round` because of `reason`. stop: have the
    ranks save and end. close: the job is over, with exit code `code`."""

    kind: Literal["round", "regroup", "stop", "close"]
    round: int = 0
    members: tuple[int, ...] = ()
    reason: str = ""
    code: int = 0


def connect(endpoint: str, job: str, timeout: timedelta = TIMEOUT) -> Store:
    """An agent's own connection to the launcher's store."""
    host, _, port = endpoint.rpartition(":")
    return PrefixStore(f"lumina/{job}", TCPStore(host, int(port), is_master=False, timeout=timeout))


class AgentBoard:
    """An agent's side."""

    def __init__(self, store: Store, about: dict[str, Any]) -> None:
        self.store = store
        self.index = store.add("agents", 1) - 1
        self._read = 0
        self.tell("hello", **about)

    def tell(self, kind: Answer, **values: Any) -> None:
        """Append to the events: a place is claimed, so that no two agents write to one, and then filled."""
        place = self.store.add("events/claimed", 1) - 1
        self.store.set(f"events/{place}", json.dumps({"agent": self.index, "kind": kind, **values}))

    def orders(self) -> list[Order]:
        """Orders that have come since the last call."""
        count, found = self.store.add("orders", 0), []
        for place in range(self._read, count):
            values = json.loads(self.store.get(f"orders/{place}"))
            found.append(Order(**{**values, "members": tuple(values["members"])}))
        self._read = count
        return found


class LauncherBoard:
    """The launcher's side; it holds the store's server."""

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

    def order(self, order: Order) -> None:
        values = {"kind": order.kind, "round": order.round, "members": order.members}
        self.store.set(f"orders/{self._given}", json.dumps({**values, "reason": order.reason, "code": order.code}))
        self._given += 1
        self.store.add("orders", 1)

    def beats(self, agent: int) -> int:
        """How often an agent has beaten."""
        return self.store.add(f"beat/{agent}", 0)

    def fence(self, agent: int) -> None:
        """Tell an agent that is taken for dead that it is not wanted any more, should it wake up."""
        self.store.set(f"fenced/{agent}", "1")
