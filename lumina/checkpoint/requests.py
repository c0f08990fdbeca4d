"""Requests for a checkpoint: files in the run's folder by which another process, anywhere, asks the job that trains it.

    RUN/requests/asked/ID.json      a request
    RUN/requests/answered/ID.taken  the job has taken it: its checkpoint will be, or was, begun
    RUN/requests/answered/ID.json   the reply

Requests and replies are in separate folders, so that no name can stand for both. A request is replied to once: the job
remembers the identifiers that it took, and leaves a record of each that outlives it. One with a record and no reply was
taken by a start that was killed, and the next one sees to it. That the request's own file can be removed is not relied
on: a folder may be another account's, and NFS shows removed files for a while. Loads no torch.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from lumina.checkpoint import lock
from lumina.config import UserError
from lumina.files import read_json, write_json

_FOLDER = "requests"
_LOOK = 1.0  # seconds after which an asker looks again whether the run still goes on
# Seconds for which the job must be gone: on this machine its process may just be ending; elsewhere its reply may be
# there and not be seen yet, and a launcher may start it again, which then takes the request.
_GONE_HERE, _GONE_ELSEWHERE = 2.0, 60.0
_FORGOTTEN = 24 * 3600.0  # seconds after which a reply that nobody fetched is removed


class SaveReply(TypedDict):
    """The checkpoint's step and path; error: why it was not written, empty when it was."""

    step: int
    path: str
    error: str


def request_save(run: Path, timeout: float, patience: float = _GONE_ELSEWHERE) -> SaveReply:
    """Ask the job that trains the run in `run` for a checkpoint now, and wait for its reply, at most `timeout` seconds,
    of which it may be gone for `patience`. Raises UserError when none comes."""
    trained = lock.in_training(run)  # before the request, so that what comes after it is a change
    identifier = secrets.token_hex(8)
    asked, taken, replied = _asked(run, identifier), _taken(run, identifier), _replied(run, identifier)
    try:
        for folder in {asked.parent, replied.parent}:
            folder.mkdir(parents=True, exist_ok=True)
        write_json(asked, {"time": time.time()})
    except OSError as error:
        raise UserError(
            f"the request cannot be written to {asked.parent}: {error.strerror or error}",
            "Ask from an account that may write to the run's folder.",
        ) from error
    now = looked = time.monotonic()
    deadline, gone_since = now + timeout, math.inf
    try:
        while now < deadline:
            reply = _read_reply(replied)
            if reply is not None:
                return reply
            if now - looked > _LOOK:
                looked, lives = now, lock.in_training(run)
                trained = trained or lives
                gone_since = min(gone_since, now) if trained and lives is False else math.inf
                wait = min(patience, _GONE_HERE) if lock.settled_at_once(run) else patience
                if now - gone_since >= wait and (reply := _read_reply(replied)) is not None:
                    return reply
                if now - gone_since >= wait:
                    raise UserError(
                        "this start of the run has ended, and nobody has saved it for this request",
                        f"See why in {run / 'train.log'}; lumina checkpoints list {run} shows what there is.",
                    )
            time.sleep(0.1)
            now = time.monotonic()
        untouched = not taken.exists() and asked.exists()
    finally:
        for file in (asked, taken, replied):
            with suppress(OSError):
                file.unlink(missing_ok=True)
    raise UserError(
        f"no checkpoint in {timeout:.0f} s: "
        + ("nothing trains this run now" if untouched else "the job is still saving"),
        "A job looks for requests at each step; --timeout SECONDS waits longer for long steps.",
    )


def _read_reply(path: Path) -> SaveReply | None:
    """The reply, once it is there."""
    try:
        reply: Any = read_json(path)
        return SaveReply(step=int(reply["step"]), path=str(reply["path"]), error=str(reply["error"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


class SaveRequests:
    """The requests to one run, as its job's rank 0 sees them."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._handled: set[str] = set()
        self._open: set[str] = set()  # taken, and not replied to
        self._forget()
        self._left = self._without_reply()

    def take(self) -> list[str]:
        """Identifiers of the requests that were made since the last call and that no start of the run took before; in
        the first call also of those that an earlier start took and was killed before it had replied."""
        found, self._left = self._left, []
        self._handled.update(found)
        self._open.update(found)
        with suppress(OSError):
            for path in sorted((self._run / _FOLDER / "asked").glob("*.json")):
                if path.stem in self._handled:
                    continue
                self._handled.add(path.stem)
                if self._first(path.stem):
                    found.append(path.stem)
                    self._open.add(path.stem)
                with suppress(OSError):
                    path.unlink()
        return found

    def reply(self, identifier: str, reply: SaveReply) -> None:
        """Write the reply to a request. One whose asker has gone is dropped."""
        self._open.discard(identifier)
        with suppress(OSError):
            write_json(_replied(self._run, identifier), reply)

    def close(self, reply: SaveReply, lost: bool = False) -> None:
        """The job ends: `reply` to every request that has no other yet. `lost`: another start of the run goes on, and
        takes those that this one has not taken."""
        if not lost:
            self.take()
        for identifier in sorted(self._open):
            self.reply(identifier, reply)

    def _first(self, identifier: str) -> bool:
        """Leave the record that this request was taken; False if an earlier start left one."""
        record = _taken(self._run, identifier)
        try:
            os.close(os.open(record, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return False
        except OSError:  # a disk that is full or read-only: this start remembers by itself
            pass
        return True

    def _without_reply(self) -> list[str]:
        with suppress(OSError):
            records = (self._run / _FOLDER / "answered").glob("*.taken")
            return sorted(path.stem for path in records if not _replied(self._run, path.stem).exists())
        return []

    def _forget(self) -> None:
        """Remove the replies and records that nobody will fetch. A record stays as long as its request does."""
        with suppress(OSError):
            now = time.time()
            for path in (self._run / _FOLDER / "answered").iterdir():
                if now - path.stat().st_mtime > _FORGOTTEN and not _asked(self._run, path.stem).exists():
                    with suppress(OSError):
                        path.unlink()


def _asked(run: Path, identifier: str) -> Path:
    return run / _FOLDER / "asked" / f"{identifier}.json"


def _taken(run: Path, identifier: str) -> Path:
    return run / _FOLDER / "answered" / f"{identifier}.taken"


def _replied(run: Path, identifier: str) -> Path:
    return run / _FOLDER / "answered" / f"{identifier}.json"
