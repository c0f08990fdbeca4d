"""Rendezvous of the ranks at MASTER_ADDR: waits until all are there, says for which, and can be interrupted.

torch waits in C++, where no signal is heard, and says nothing for as long as its timeout. What is waited for here are
keys of a store at the same address, which torch shares with the process group's own (one server in a process).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from datetime import timedelta
from functools import partial
from itertools import groupby
from typing import Any

from lumina.cluster.launcher_detection import Launched
from lumina.config import UserError
from lumina.processes import is_there, this_process

log = logging.getLogger("lumina")

_POLL = 0.1  # seconds
_FIRST_WORD, _NEXT_WORD = 10.0, 60.0  # seconds of waiting after which it is said; ranks load torch at unequal speed
_ANSWER = 15.0  # seconds in which a store answers


def await_ranks(here: Launched, patience: float) -> Any:
    """Returns when every rank has called it: something to keep until the process group is there. `patience`: seconds.

    Raises:
        UserError: some did not come in time, or rank 0 has ended meanwhile; a RuntimeError under an agent, whose
            launcher restarts them.
        torch.distributed.DistError: rank 0 cannot listen at MASTER_PORT.
    """
    from torch.distributed import DistError

    wait = _Wait(here, time.monotonic() + patience)
    store = _connect(here, wait)
    if here.rank == 0:
        store.set("lumina/job", _job(here))
        everyone = [f"lumina/rank/{rank}" for rank in range(1, here.world)]
        while not store.check(everyone):
            wait.once(lambda: _listed([r for r in range(1, here.world) if not store.check([everyone[r - 1]])]))
        store.set("lumina/all", "")
        return store
    try:
        if _agent_serves(os.environ):  # it keeps what the ranks of an earlier start said
            store.set(f"lumina/rank/{here.rank}", "")
        else:
            while not store.check(["lumina/job"]):
                wait.once(None)
            _join(store, here)
        while not store.check(["lumina/all"]):
            wait.once(None)  # rank 0 says for whom
    except DistError as error:
        raise _closed(error) from None
    return store


def await_key(store: Any, key: str, patience: float) -> bytes:
    """What rank 0 puts under `key`, waited for as `await_ranks` waits: Ctrl-C is heard. `patience`: seconds."""
    from torch.distributed import DistError

    until = time.monotonic() + patience
    try:
        while not store.check([key]):
            if time.monotonic() > until:
                raise _failure(f"rank 0 did not say {key} in {patience:.0f} s")
            time.sleep(_POLL / 10)
        found: bytes = store.get(key)
        return found
    except DistError as error:
        raise _closed(error) from None


def _closed(error: Exception) -> Exception:
    said = str(error).partition("\n")[0]  # torch's own stack follows
    return _failure(f"rank 0 has ended: its store is closed ({said})")


def _job(here: Launched) -> str:
    """What is the same on every rank of a job, as far as a launcher says it."""
    return f"{here.world} {os.environ.get('LUMINA_JOB', '')}"


def _join(store: Any, here: Launched) -> None:
    """Join the ranks of the store's job. UserError where that is another one, which meets at the same address and port.
    One that is as large and has no other name is told by its ranks: each is there once. One that was started again
    while the others still wait takes the place of its earlier start, where that is gone or on another machine."""
    found = store.get("lumina/job").decode()
    if found != _job(here):
        raise _another_job(here, f"of {found.partition(' ')[0]} ranks")
    # The token tells two starts in one process apart.
    own = json.dumps({**this_process(), "token": secrets.token_hex(8)})
    key, before = f"lumina/rank/{here.rank}", ""
    while (now := store.compare_set(key, before, own).decode()) != own:
        before = now
        if is_there(json.loads(before)):
            raise _another_job(here, f"whose rank {here.rank} is there already")
        if store.check(["lumina/all"]):
            raise _failure(f"rank {here.rank} was started again when all {here.world} had met: the others are gone on")


def _another_job(here: Launched, why: str) -> Exception:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return _failure(
        f"rank {here.rank} of {here.world} met another job at {address} port {port}, {why}",
        "Give each job its own MASTER_PORT.",
    )


def _connect(here: Launched, wait: _Wait) -> Any:
    """The store at MASTER_ADDR: its server is in rank 0, or in torchrun's agent, which says so."""
    from lumina.cluster.elastic.torch_store import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = here.rank == 0 and not _agent_serves(os.environ)

    def make() -> Any:
        return TCPStore(
            address, port, here.world, serves, timedelta(seconds=_ANSWER), wait_for_workers=False,
            multi_tenant=True, use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
        )  # fmt: skip

    while True:
        try:
            if not serves:  # torch's own attempts cannot be interrupted
                socket.create_connection((address, port), _POLL * 20).close()
            server = make() if serves else _in_thread(make, partial(wait.once, f"an answer of {address} port {port}"))
            return PrefixStore(prefix(os.environ), server)
        except (OSError, RuntimeError) as error:
            if serves:
                raise
            wait.once(f"rank 0 at {address} port {port} ({error})")


def _in_thread(make: Callable[[], Any], wait: Callable[[], None]) -> Any:
    """What `make` returns or raises; `wait` is called until then. For what cannot be interrupted: torch waits without
    an end for the first answer of whatever listens, such as a rank 0 that is suspended, or no store at all."""
    done: futures.Future[Any] = futures.Future()

    def run() -> None:
        try:
            done.set_result(make())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="lumina-rendezvous", daemon=True).start()
    # Not by a result's own time limit: it may come right after that, and its TimeoutError is no answer then.
    while not futures.wait([done], timeout=2 * _POLL).done:
        wait()
    return done.result()


def _agent_serves(environment: Mapping[str, str]) -> bool:
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def prefix(environment: Mapping[str, str]) -> str:
    """What the keys of this meeting begin with, the same on every rank. A store of torchrun's agent outlives its ranks,
    and their next start is told from the one before by the agents' count of restarts, as torch does. A store of rank 0
    is as new as the ranks are, and the count is of no use there: each node's agent counts its own restarts."""
    return f"lumina/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}" if _agent_serves(environment) else "lumina"


class _Wait:
    """Waiting with an end, of which a line is said now and then."""

    def __init__(self, here: Launched, until: float) -> None:
        self._here, self._until = here, until
        self._said_at = time.monotonic() + _FIRST_WORD - _NEXT_WORD

    def once(self, whom: Callable[[], str] | str | None) -> None:
        """A moment of it. `whom`: who is missing, or what makes the words for it; None to say nothing."""
        now, here = time.monotonic(), self._here
        if now > self._until:
            raise _failure(f"{_words(whom)} did not come")
        if whom is not None and now - self._said_at >= _NEXT_WORD:
            self._said_at = now
            log.warning(
                "rank %d of %d waits for %s, %.0f s more at most. %s=%d says how many ranks there are; to train in "
                "this process alone: RANK=0 WORLD_SIZE=1", here.rank, here.world, _words(whom), self._until - now,
                here.variables[1], here.world,
            )  # fmt: skip
        time.sleep(_POLL)


def _failure(
    what: str, remedy: str = "Did the launcher start them all? Their own output, or its log, says what ended them."
) -> Exception:
    return RuntimeError(what) if "LUMINA_AGENT" in os.environ else UserError(what, remedy)


def _listed(ranks: Sequence[int]) -> str:
    """Ranks 1, 3-5."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _words(whom: Callable[[], str] | str | None) -> str:
    return whom() if callable(whom) else whom or "the others"
