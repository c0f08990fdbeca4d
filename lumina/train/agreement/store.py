"""Agreement through the process group's key-value store, without a collective.

A collective ends with an error when a rank comes ten minutes late, or whatever the process group's timeout is. Before
the first step a rank may well be late: it prepares the data, or verifies a checkpoint of a terabyte. Here the others
wait as long as it takes, say for whom and for what, and end when a rank that they wait for sends no heartbeat.
"""

from __future__ import annotations

import itertools
import json
import logging
import pickle
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeGuard, TypeVar, cast

from lumina.checkpoint import RunLock
from lumina.config import UserError, user_error
from lumina.files import FormatError
from lumina.train.deepspeed import Ranks
from lumina.train.torch_private import default_store

log = logging.getLogger("lumina")
T = TypeVar("T")
R = TypeVar("R")

_HEARTBEAT = 2.0  # seconds between a rank's heartbeats
_GONE = 60.0  # seconds without one: a rank may be stopped for a while, or hold the interpreter's lock
# Seconds without a first one. A rank sends it as soon as it has joined the others, but in a process that trains several
# runs, where it may do something of its own between two: it has as long as it had to join.
_NEVER_SEEN = 600.0
_ACKNOWLEDGE = 10.0  # seconds that rank 0 waits for the others to have read why all of them end
_LEFT, _QUIET = "left", "quiet"  # the last heartbeat of a rank that an exception ended, and of one that goes on
_SAY_AFTER, _SAY_EVERY = 10.0, 60.0  # seconds
_counts: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)  # agreements of each start so far


class LostRankError(RuntimeError):
    """A rank that the others wait for is gone. rank: which, where it is known."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message, rank)
        self.rank = rank

    def __str__(self) -> str:
        return str(self.args[0])


def exchange(key: str, value: dict[str, Any], ranks: Ranks, seconds: float) -> list[dict[str, Any]] | None:
    """Every rank's `value` under `key`, which is used once in a start, without a collective; None when some rank says
    nothing for `seconds`."""
    if ranks.world == 1:
        return [value]
    key = f"{key}/{ranks.start}"
    try:
        group = default_store()
        group.set(f"{key}/{ranks.rank}", json.dumps(value))
        keys = [f"{key}/{other}" for other in range(ranks.world)]
        group.wait(keys, timedelta(seconds=seconds))
        return [json.loads(group.get(name)) for name in keys]
    except Exception as error:  # a rank that is gone, or the store with it
        log.warning("the ranks could not agree: %s", error)
        return None


def decided_by_rank_0(ranks: Ranks, choose: Callable[[], T], what: str = "rank 0 reads the run's folder") -> T:
    """Rank 0's choice, or what kept it from that, on every rank: its UserError, or what a file or a disk did to it with
    its host; LostRankError on the others for any other exception. `what`: it does meanwhile, for people."""
    if ranks.world == 1:
        return choose()
    key = _key(ranks)
    if ranks.main:
        with heartbeats(ranks):
            _put_outcome(ranks, key, choose)
    chosen: T = _outcome(ranks, key, what)
    return chosen


def gathered(ranks: Ranks, what: str, value: T, conclude: Callable[[Sequence[T]], R]) -> R:
    """What rank 0 concludes from every rank's `value`, or the UserError that it raises, on every rank. `what`: the
    ranks that are late do, for people."""
    if ranks.world == 1:
        return conclude([value])
    key = _key(ranks)
    _put(f"{key}/{ranks.rank}", pickle.dumps(value))
    if ranks.main:
        value_of = partial(_value_of, ranks, key, what)
        _put_outcome(ranks, key, lambda: conclude([value_of(rank) for rank in range(ranks.world)]))
    concluded: R = _outcome(ranks, key, what)
    return concluded


def together(ranks: Ranks, what: str, work: Callable[[], T]) -> T:
    """This rank's `work`, unless a rank met a user's mistake in its own: then a UserError on every rank, which names
    those ranks and their hosts. Any other exception of a rank's is LostRankError on the others. `what`: the work, for
    people."""
    value: T | None = None
    refusal: UserError | None = None
    try:
        value = work()
    except UserError as error:
        refusal = error
    except Exception as error:
        if _of_files(error):
            refusal = user_error(error)
        else:
            if ranks.main and ranks.world > 1:
                _put_outcome(ranks, _key(ranks), partial(_raise, error))
            raise
    gathered(ranks, what, (socket.gethostname(), refusal), refuse_together)
    return cast(T, value)


def refuse_together(answers: Sequence[tuple[str, UserError | None]]) -> None:
    """Raise what the ranks, each with its host, refuse, where one does."""
    refusals = {rank: (host, error) for rank, (host, error) in enumerate(answers) if error is not None}
    if not refusals:
        return
    rank, (host, first) = next(iter(refusals.items()))
    if len(refusals) == len(answers) and len({str(error) for _, error in refusals.values()}) == 1:
        raise first
    others = f" (and {len(refusals) - 1} more of {len(answers)} ranks)" if len(refusals) > 1 else ""
    raise UserError(f"rank {rank} on {host}{others}: {first.message}", first.remedy)


def assert_lock_held(ranks: Ranks, lock: RunLock | None) -> None:
    """Raises UserError on every rank when a later start of the run has taken `lock`, which is rank 0's."""
    decided_by_rank_0(ranks, lambda: None if lock is None else lock.assert_held())


@contextmanager
def heartbeats(ranks: Ranks) -> Iterator[None]:
    """In the block this rank sends the others a heartbeat every two seconds, whatever its main thread does. Outside of
    one, in the training, the watchdog and the launcher see to ranks that are gone."""
    if ranks.world == 1:
        yield
        return
    ended = threading.Event()
    store, host, heartbeat = default_store(), socket.gethostname(), _heartbeat_key(ranks, ranks.rank)

    def renew() -> None:
        for number in itertools.count():
            try:
                store.set(heartbeat, f"{number} {host}")
            except RuntimeError:  # the store's process is gone: whoever waits finds that out
                return
            if ended.wait(_HEARTBEAT):
                return

    thread = threading.Thread(target=renew, name="lumina-heartbeats", daemon=True)
    thread.start()
    last = f"{_QUIET} {host}"
    try:
        yield
    except BaseException as error:
        last = f"{_LEFT} {host} {type(error).__name__}: {error}"
        raise
    finally:
        ended.set()
        thread.join()
        with suppress(RuntimeError):
            store.set(heartbeat, last)


def _key(ranks: Ranks) -> str:
    """A key that no other agreement has: every rank takes part in each of them, in one order."""
    return f"lumina/agreement/{ranks.start}/{next(_counts[ranks.start])}"


def _heartbeat_key(ranks: Ranks, rank: int) -> str:
    return f"lumina/alive/{ranks.start}/{rank}"


def _put_outcome(ranks: Ranks, key: str, choose: Callable[[], Any]) -> None:
    """Rank 0's word under `key`: what it chose, or the exception that kept it from that."""
    said: tuple[Any, Exception | None]
    place = f"rank 0 on {socket.gethostname()}"
    try:
        said = (choose(), None)
    except (UserError, LostRankError) as error:
        said = (None, error)
    except BaseException as error:
        if _of_files(error):
            _put(f"{key}/0-says", pickle.dumps((None, _met_by(place, error))))
            return
        why = LostRankError(f"{place} has ended: {type(error).__name__}: {error}")
        with suppress(LostRankError):
            _put(f"{key}/0-says", pickle.dumps((None, why)))
        if isinstance(error, Exception):  # a signal has mostly ended the others, too
            _await_acknowledgement(ranks, key)
        raise
    _put(f"{key}/0-says", pickle.dumps(said))


def _put(name: str, value: bytes) -> None:
    try:
        default_store().set(name, value)
    except RuntimeError as error:
        raise _without_store(error) from error


def _without_store(error: RuntimeError, what: str = "") -> LostRankError:
    """The store's own error: its process, which is rank 0's or the launcher's, is gone. torch's own stack follows."""
    return LostRankError(f"rank 0 or the launcher is gone{what}: {str(error).partition(chr(10))[0]}")


def _raise(error: Exception) -> None:
    raise error


def _of_files(error: BaseException) -> TypeGuard[OSError | FormatError | UnicodeError]:
    """Whether a file or a disk did it, which a user can put right. A connection may be that to another rank."""
    of_a_connection = isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, OSError | FormatError | UnicodeError) and not of_a_connection


def _met_by(place: str, error: OSError | FormatError | UnicodeError) -> OSError | FormatError:
    """What a file or a disk did to a rank, as the others raise it: of the same kind, and it says where."""
    if not isinstance(error, OSError):
        return FormatError(f"{place}: {error}")
    if error.errno is None:
        return OSError(f"{place}: {error}")
    return OSError(error.errno, f"{error.strerror} ({place})", error.filename, None, error.filename2)


def _value_of(ranks: Ranks, key: str, what: str, rank: int) -> Any:
    """What a rank said under `key`."""
    return pickle.loads(_await(ranks, key, rank, f"{key}/{rank}", what))


def _outcome(ranks: Ranks, key: str, what: str) -> Any:
    chosen, error = pickle.loads(_await(ranks, key, 0, f"{key}/0-says", what))
    if error is None:
        return chosen
    if ranks.main:
        _await_acknowledgement(ranks, key, error.rank if isinstance(error, LostRankError) else None)
    else:
        with suppress(LostRankError):
            _put(_acknowledged(key, ranks.rank), b"1")
    if not isinstance(error, LostRankError):
        error.repeated = ranks.local_rank != 0  # as a UserError, which it is or will be
    raise error


def _await_acknowledgement(ranks: Ranks, key: str, gone: int | None = None) -> None:
    """Rank 0 may hold the store, and ends now: until the others have read why, but for one that is `gone`."""
    with suppress(RuntimeError):
        others = [_acknowledged(key, rank) for rank in range(1, ranks.world) if rank != gone]
        default_store().wait(others, timedelta(seconds=_ACKNOWLEDGE))


def _acknowledged(key: str, rank: int) -> str:
    return f"{key}/acknowledged/{rank}"


def _await(ranks: Ranks, key: str, rank: int, name: str, what: str) -> bytes:
    """What `rank` puts under `name`, waited for as long as it takes and `rank` lives."""
    store, heartbeat = default_store(), _heartbeat_key(ranks, rank)
    waited = silent = 0.0
    said, pause, newest = _SAY_AFTER - _SAY_EVERY, 0.002, b""
    last = time.monotonic()
    try:
        while not store.check([name]):
            time.sleep(pause)
            now = time.monotonic()
            # Of one turn a second counts at most: this process may have been stopped, and the others with it.
            turn, last, pause = min(now - last, 1.0), now, min(1.5 * pause, 0.5)
            waited, silent = waited + turn, silent + turn
            if waited - said > _SAY_EVERY and ranks.local_rank == 0:
                said = waited
                log.info("rank %d waits for %s: %s (%.0f s)", ranks.rank, _late(ranks, store, key), what, waited)
            seen = store.get(heartbeat) if store.check([heartbeat]) else b""
            if seen.startswith(_LEFT.encode()):
                if store.check([name]):  # it said its word first
                    break
                why = seen.decode().split(" ", 2)[2]
                raise LostRankError(f"{_place(ranks, store, rank)} has ended ({what}): {why}", rank)
            if seen != newest or seen.startswith(_QUIET.encode()):
                newest, silent = seen, 0.0
            patience = _GONE if seen else _NEVER_SEEN
            if silent > patience:
                said_nothing = f"sends no heartbeat for {patience:.0f} s ({what})"
                raise LostRankError(f"{_place(ranks, store, rank)} {said_nothing}", rank)
        found: bytes = store.get(name)
        return found
    except LostRankError:
        raise
    except RuntimeError as error:
        raise _without_store(error, f" ({what})") from error


def _place(ranks: Ranks, store: Any, rank: int) -> str:
    """A rank with its host, where that is known."""
    heartbeat = _heartbeat_key(ranks, rank)
    words = store.get(heartbeat).decode().split(" ") if store.check([heartbeat]) else []
    return f"rank {rank} on {words[1]}" if words else f"rank {rank}"


def _late(ranks: Ranks, store: Any, key: str) -> str:
    """The ranks of which the others wait to hear; rank 0 where it alone has a word to say."""
    told = [store.check([f"{key}/{rank}"]) for rank in range(ranks.world)]
    late = [rank for rank, has_told in enumerate(told) if not has_told] if any(told) else [0]
    more = f" and {len(late) - 4} more" if len(late) > 4 else ""
    return ", ".join(_place(ranks, store, rank) for rank in late[:4] or [0]) + more
