"""`lumina check-environment --hostfile FILE`: asks every node, in parallel and within a bound, what would go wrong.

One ssh for each node starts lumina.cluster.preflight.probe there; questions and answers pass over it in JSON lines
until the end. A node that fails to answer is a finding and is asked no further; the others go on. Whatever happens, the
processes here are ended, and a probe ends when its input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lumina.cluster import topology
from lumina.cluster.environment import forwarded
from lumina.cluster.hostfile import Host, read_hostfile
from lumina.cluster.preflight import checks
from lumina.cluster.preflight.checks import HEAD, NodeFinding, found
from lumina.cluster.preflight.connection import NoAnswerError, NodeConnection
from lumina.cluster.preflight.probe import Listener, own_versions, wait_for_text
from lumina.cluster.preflight.report import Answers, Report
from lumina.cluster.preflight.table import as_dict, show
from lumina.cluster.transport import is_here, resolved
from lumina.config import RunConfig, UserError
from lumina.terminal import say

_PROBE = "lumina.cluster.preflight.probe"
_EXCHANGES = 8  # of clocks; the quickest counts
_SHARE_PATIENCE = 5.0  # seconds in which a file must be seen on the other side
_CONNECT_PATIENCE = 5.0
_REDUCE_PATIENCE = 40.0
_SPARE = 1.0  # seconds that an answer may take beyond what it is about
_REMEDY = "See the error; `lumina check-environment` on that node says more."
_REMEDIES = {
    "port": "See who holds the port there (ss -ltnp), or give another --port.",
    "all-reduce": "Try again under NCCL_DEBUG=INFO (it reaches the nodes), and look at the firewall between the nodes.",
}


def preflight_command(
    hostfile: str, output_dir: str | None, port: int, timeout: float, *, json_output: bool = False
) -> int:
    """Ask the nodes and print what was found; 0 when nothing FAILs, else 1. Raises UserError for a bad hostfile."""
    hosts = read_hostfile(hostfile)
    if any(not is_here(host) for host in hosts) and shutil.which("ssh") is None:
        raise UserError("ssh is not installed here", "Install it: apt-get install openssh-client.")
    folder = Path(output_dir or RunConfig.model_fields["output_dir"].default).absolute()
    say(f"asking {len(hosts)} node(s), for at most {timeout:g} s", file=sys.stderr, flush=True)
    report = asyncio.run(Preflight(hosts, folder, port, timeout).run())
    if json_output:
        say(json.dumps(as_dict(report)))
    else:
        show(report)
    return 0 if report.ok else 1


class Preflight:
    """One preflight. `port`: which one to try, 0 for any free; `timeout`: seconds for all of it."""

    def __init__(self, hosts: list[Host], folder: Path, port: int, timeout: float) -> None:
        self._hosts, self._folder, self._port, self._timeout = hosts, folder, port, timeout
        self._deadline = 0.0
        self._live: dict[str, NodeConnection] = {}
        self._report = Report(hosts)
        self._mark = f".lumina-preflight-{uuid.uuid4().hex}"
        self._peer = _own_address(hosts)
        self._addresses: dict[str, str] = {}

    async def run(self) -> Report:
        """Never longer than the timeout and the seconds it takes to end processes."""
        self._deadline = time.monotonic() + self._timeout
        _allow_open_files(4 * len(self._hosts) + 100)
        connections: list[NodeConnection] = []
        try:
            for host in self._hosts:
                connections.append(await NodeConnection.open(host, _PROBE, os.getcwd()))
            self._live = {connection.name: connection for connection in connections}
            await self._reach()
            await self._ask_facts()
            await self._compare_clocks()
            await self._try_folder()
            if await self._try_ports():
                await self._try_all_reduce()
        finally:
            await asyncio.gather(*(connection.close() for connection in connections))
        rank = {name: number for number, name in enumerate([HEAD, *(host.name for host in self._hosts)])}
        self._report.findings.sort(key=lambda item: (rank[item.node], checks.AREAS.index(item.finding.name)))
        return self._report

    # --- Asking ---

    async def _ask(self, area: str, do: str, patience: float, questions: Mapping[str, Mapping[str, Any]]) -> Answers:
        """Ask some nodes at once. Those that give no answer, or an error, become findings; the silent are left."""

        async def one(name: str, values: Mapping[str, Any]) -> None:
            bound = min(patience, self._deadline - time.monotonic())
            try:
                answer = await self._live[name].ask(do, bound, values)
            except NoAnswerError as error:
                self._lose(name, area, str(error))
                return
            if "error" in answer:
                self._add(found(name, "FAIL", area, answer["error"], _REMEDIES.get(area, _REMEDY)))
            else:
                answers[name] = answer

        answers: Answers = {}
        await asyncio.gather(*(one(name, values) for name, values in questions.items() if name in self._live))
        return {name: answers[name] for name in questions if name in answers}  # in the hostfile's order

    def _lose(self, name: str, area: str, error: str) -> None:
        del self._live[name]
        remedy = "The machine or its file system is very slow, or hangs: look there; or give a longer --timeout."
        self._add(found(name, "FAIL", area, error, remedy))

    def _add(self, *items: NodeFinding) -> None:
        self._report.findings += items

    # --- The checks, in order ---

    async def _reach(self) -> None:
        async def one(name: str, connection: NodeConnection) -> None:
            try:
                await connection.hello(self._timeout / 2)
                self._add(found(name, "OK", "ssh", "reached"))
            except NoAnswerError as error:
                del self._live[name]
                self._add(checks.unreachable(name, str(error)))

        await asyncio.gather(*(one(name, connection) for name, connection in list(self._live.items())))

    async def _ask_facts(self) -> None:
        here = {host.name for host in self._hosts if is_here(host)}
        other = next((resolved(host.name) for host in self._hosts if host.name not in here), "127.0.0.1")
        environment = forwarded(())
        facts = await self._ask("versions", "facts", self._timeout * 0.6, {
            name: {"environment": {} if name in here else environment, "limit": self._timeout + 10,
                   "peer": other if name in here else self._peer}
            for name in self._live
        })  # fmt: skip
        if not facts:
            return
        self._report.facts = facts
        self._add(*checks.versions(facts, own_versions()), *checks.slots(self._hosts, facts))
        self._add(*checks.gpus(facts), *checks.network(facts))
        self._addresses = {name: (fact["interface"] or {}).get("address", "") for name, fact in facts.items()}

    async def _compare_clocks(self) -> None:
        """The nodes say their time; it was that at some moment between question and answer."""

        async def one(name: str) -> tuple[float, float] | None:
            offset, uncertainty = 0.0, float("inf")
            for _ in range(_EXCHANGES):
                began, start = time.time(), time.perf_counter()
                answers = await self._ask("clock", "time", 10.0, {name: {}})
                took = time.perf_counter() - start
                if name not in answers:
                    return None
                if took / 2 < uncertainty:
                    offset, uncertainty = answers[name]["time"] - began - took / 2, took / 2
            return offset, uncertainty

        names = list(self._live)
        offsets = dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))
        self._add(*checks.clocks({name: offset for name, offset in offsets.items() if offset is not None}))

    async def _try_folder(self) -> None:
        """A file from here must be seen there, and one from there here."""
        mine = self._folder / f"{self._mark}.head"
        token = uuid.uuid4().hex
        made = [place for place in (self._folder, *self._folder.parents) if not place.exists()]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            mine.write_text(token, encoding="ascii")
        except OSError as error:
            self._add(found(HEAD, "FAIL", "shared", f"cannot write to {self._folder}: {error.strerror}",
                            "Give --output-dir a folder on the shared file system where you may write."))  # fmt: skip
            return
        try:
            values = {"folder": str(self._folder), "mark": self._mark, "token": token, "patience": _SHARE_PATIENCE}
            asked = {name: {**values, "name": str(number)} for number, name in enumerate(self._live)}
            answers = await self._ask("shared", "share", 2 * _SHARE_PATIENCE + _SPARE, asked)
            saw = await asyncio.gather(
                *(asyncio.to_thread(wait_for_text, self._folder / f"{self._mark}.{asked[name]['name']}", token,
                                    _SHARE_PATIENCE if answer["seen"] and not answer["wrote"] else 0.0)
                  for name, answer in answers.items())
            )  # fmt: skip
            self._add(*checks.shared(str(self._folder), answers, dict(zip(answers, saw, strict=True))))
            await self._ask("shared", "unshare", _SHARE_PATIENCE, {name: {} for name in answers})
        finally:
            mine.unlink(missing_ok=True)
            with suppress(OSError):  # somebody has put something there meanwhile
                for place in made:
                    place.rmdir()

    async def _try_ports(self) -> bool:
        """Every node listens, the others connect; and all connect here, as they will to the launcher's store."""
        tokens = {name: uuid.uuid4().hex for name in [HEAD, *self._live]}
        ports = await self._ask("port", "listen", 10.0, {
            name: {"port": self._port, "token": tokens[name]} for name in self._live
        })  # fmt: skip
        listening = {name: (self._addresses.get(name, ""), answer["port"]) for name, answer in ports.items()}
        own = None
        if self._peer is not None and not any(is_here(host) for host in self._hosts):
            try:
                own = Listener(self._port, tokens[HEAD])
                listening[HEAD] = (self._peer, own.port)
            except OSError as error:
                remedy = f"See who holds port {self._port} (ss -ltnp), or give another --port."
                self._add(found(HEAD, "FAIL", "port", f"cannot listen: {error.strerror}", remedy))
        names = [name for name in listening if name != HEAD and listening[name][0]]
        pairs = checks.links(names) + [(name, HEAD) for name in names if own is not None]
        tried: dict[str, list[str]] = {name: [b for a, b in pairs if a == name] for name in names}
        questions = {
            name: {
                "patience": _CONNECT_PATIENCE,
                "targets": [{"name": _label(target, listening[target]), "address": listening[target][0],
                             "port": listening[target][1], "token": tokens[target]} for target in targets],
            }
            for name, targets in tried.items()
        }  # fmt: skip
        try:
            answers = await self._ask("port", "connect", 2 * _CONNECT_PATIENCE + _SPARE, questions)
        finally:
            if own is not None:
                own.close()
        failed = {name: answer["failed"] for name, answer in answers.items()}
        self._add(*checks.ports(failed, {name: tried[name] for name in answers}))
        return not any(failed.values())

    async def _try_all_reduce(self) -> None:
        names = [name for name in self._live if self._addresses.get(name)]
        if len(names) < 2:
            return
        backend = "nccl" if all(self._report.facts[name]["visible"] for name in names) else "gloo"
        first = names[0]
        met = await self._ask("all-reduce", "meet", 20.0, {first: {"world": len(names), "port": self._port}})
        if first not in met:
            return
        patience = max(1.0, min(_REDUCE_PATIENCE, self._deadline - time.monotonic() - _SPARE))
        values = {"backend": backend, "address": self._addresses[first], "port": met[first]["port"],
                  "world": len(names), "patience": patience}  # fmt: skip
        asked = {name: {**values, "rank": rank} for rank, name in enumerate(names)}
        self._report.reduced = await self._ask("all-reduce", "allreduce", patience + _SPARE, asked)
        self._add(*checks.all_reduce(backend, self._report.reduced))


def _label(target: str, listening: tuple[str, int]) -> str:
    return f"{target} ({listening[0]} port {listening[1]})"


def _own_address(hosts: list[Host]) -> str | None:
    """The address at which the nodes reach this machine; None where the names of the first few are not known here."""
    node = topology.read()
    for host in [host for host in hosts if not is_here(host)][:3]:
        with suppress(UserError):
            return topology.choose_interface(node, resolved(host.name)).address
    return None


def _allow_open_files(number: int) -> None:
    """Three pipes for each node: a thousand nodes are more than the usual limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
