"""Run lock: only the newest process group may write here, and none takes the run from a start that lives.

Every start of a run writes a token of its own to `.owner.json`, with where and since when it runs; a process that finds
another token there has lost the lock, ends, and writes nothing more. While it runs it renews the time of its heartbeat
file, `.owner-TOKEN`, and removes it at its end.

A start is refused while an earlier one lives: on the same machine, while its process is there; on another one, while
its heartbeat goes on, by the clock of the file system. It takes the lock from one whose heartbeat has stopped: a node
that was cut off or suspended can wake up long after its job was restarted elsewhere, and must then end by itself.
Within one launch (`job`) the newest start gets the lock at once: the launcher has ended the one before, or cannot
reach it. So does a Slurm job that was queued again from what is left of its earlier start, never the other way round.
The job also says whether a start goes on by itself: a restart by the same launch does, a new launch must be told to
with --resume.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

from lumina.checkpoint.format import list_checkpoints
from lumina.config import UserError, user_error
from lumina.files import read_json, write_json
from lumina.processes import is_there, machine, this_process

log = logging.getLogger("lumina")

NAME = ".owner.json"
# The launch that `lumina launch` makes in a Slurm job; up to 0.2.0 its number alone.
_SLURM = re.compile(r"(?P<job>slurm-\w+)(?:\.(?P<restarts>\d+)\.\w+)?", re.ASCII)
_HEARTBEAT = 5.0  # seconds
_STALE = 60.0  # seconds without a heartbeat: of a start whose process cannot be looked at
# What reading the lock may fail with though nobody took it: a network file system that stumbles, too many open files.
_PASSING = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class RunLock:
    """Taken by rank 0 when a run starts, once `refuse_owned` has let it."""

    def __init__(self, folder: Path, launch: str | None, global_batch: int) -> None:
        self._folder, self._path = folder, folder / NAME
        self.token = secrets.token_hex(8)
        self._heartbeat = folder / f".owner-{self.token}"
        self._released = threading.Event()
        owner = {**this_process(), "since": time.time()}
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._heartbeat.touch()
            before = f".owner-{_read(self._path).get('token')}"
            write_json(self._path, {"token": self.token, "job": launch, "global_batch_size": global_batch, **owner})
        except OSError as error:
            with suppress(OSError):  # a start that did not begin leaves nothing
                self._heartbeat.unlink(missing_ok=True)
                if made:
                    folder.rmdir()
            raise UserError(
                f"the run's folder {folder} cannot be written: {error.strerror or error}",
                "Choose another --output-dir.",
            ) from error
        for heartbeat in folder.glob(".owner-*"):
            if heartbeat.name == before:  # no other: a start at this very moment may own the run by now
                with suppress(OSError):
                    heartbeat.unlink()
        threading.Thread(target=self._renew, name="lumina-lock", daemon=True).start()

    def held(self) -> bool:
        """Whether no later start has taken the lock, as far as it can be read."""
        return owned_by(self._folder, self.token)

    def assert_held(self) -> None:
        """Raises UserError when a later start of the run has taken the lock."""
        found = _owner(self._folder, self.token)
        if found.get("token") != self.token:
            owner = f"{_described(found)} owns" if found else "somebody else changed"
            raise UserError(
                f"{owner} the run {self._folder} now; this start has ended and writes nothing more",
                "Two launches of one --experiment-name at a time? Give each its own.",
            )

    def release(self) -> None:
        """The run has ended: the next start need not look whether this one lives."""
        self._released.set()
        with suppress(OSError):
            self._heartbeat.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(_HEARTBEAT):
            try:
                os.utime(self._heartbeat)  # the file system's clock, never creating it: a later start removes it
            except FileNotFoundError:
                return
            except OSError:
                continue


def refuse_owned(folder: Path, launch: str | None) -> None:
    """Raises UserError while an earlier start of the run lives, unless it was made by the same launch or by this Slurm
    job before it was queued again. Leaves nothing written; may wait for a minute to see whether a heartbeat on another
    machine goes on."""
    try:
        found = _read(folder / NAME, _PASSING | {errno.EACCES, errno.EPERM})
        if not found or (launch is not None and _goes_on(found.get("job"), launch)):
            return
        lives = _lives(folder, found)
    except OSError as error:  # whether another start lives is not known
        raise user_error(error) from error
    if lives:
        raise UserError(
            f"{_described(found)} owns the run {folder} and still trains it",
            "Stop that one first (SIGTERM has it save), or give this one its own --experiment-name.",
        )
    if (folder / f".owner-{found.get('token')}").exists():
        log.warning("%s owned the run %s and is gone: this start takes it over", _described(found), folder)


def owned_by(folder: Path, token: str) -> bool:
    """Whether the start of `token` owns the run in `folder`, as far as its lock can be read: by any rank of it."""
    return _owner(folder, token).get("token") == token


def in_training(folder: Path) -> bool | None:
    """Whether the last start of the run in `folder` lives, as far as can be told at once; None where there is none, or
    the file system does not say."""
    try:
        owner = _read(folder / NAME, _PASSING | {errno.EACCES, errno.EPERM})
        if not owner:
            return None
        lives = _lives_here(folder, owner)
        if lives is not None:
            return lives
        _, age = _heartbeat_age(folder, folder / f".owner-{owner.get('token')}")
    except OSError:
        return None
    return age is not None and age < _STALE


def settled_at_once(folder: Path) -> bool:
    """Whether a start of the run in `folder` that has ended is seen to have ended for good, and all it left is seen: it
    ran on this machine, and no launcher starts it again. A network file system shows files up to a minute late."""
    owner = _read(folder / NAME)
    return owner.get("machine") == machine() and owner.get("job") is None


def _owner(folder: Path, token: str) -> dict[str, Any]:
    """What the lock says; `token` while it cannot be read and nothing tells of another one."""
    try:
        return _read(folder / NAME, _PASSING)
    except OSError:
        return {"token": token}


def has_begun(folder: Path) -> bool:
    """Whether a start of the run in `folder` has claimed it, if only before its first checkpoint, as far as its files
    can be read."""
    with suppress(OSError):
        return bool(_read(folder / NAME) or list_checkpoints(folder / "checkpoints"))
    return False


def last_launch(folder: Path) -> str | None:
    """The launch that made the last start of the run in `folder`, if one did."""
    job = _read(folder / NAME).get("job")
    return job if isinstance(job, str) else None


def last_global_batch(folder: Path, launch: str | None) -> int | None:
    """The global batch of the run in `folder` if `launch` goes on with its last start by itself, else None."""
    found = _read(folder / NAME)
    size = found.get("global_batch_size")
    return size if launch is not None and _goes_on(found.get("job"), launch) and isinstance(size, int) else None


def _goes_on(before: Any, launch: str) -> bool:
    """The same launch, or that of a Slurm job which was queued again since: never one from before that."""
    if before == launch:
        return True
    names = [_SLURM.fullmatch(name) for name in (str(before), launch)]
    earlier, later = (name and (name["job"], int(name["restarts"] or -1)) for name in names)
    return bool(earlier and later and earlier[0] == later[0] and earlier[1] < later[1])


# --- Whether a start lives ------------------------------------------------------------------------


def _lives_here(folder: Path, owner: dict[str, Any]) -> bool | None:
    """None for a start on another machine, of which a heartbeat is there."""
    if not (folder / f".owner-{owner.get('token')}").exists():  # it ended, or is of a version that had none
        return False
    return is_there(owner)


def _lives(folder: Path, owner: dict[str, Any]) -> bool:
    here = this_process()
    if all(owner.get(name) == here[name] for name in ("machine", "pid", "started")):
        return False  # an earlier run of this very process
    lives = _lives_here(folder, owner)
    if lives is not None:
        return lives
    heartbeat = folder / f".owner-{owner.get('token')}"
    last, age = _heartbeat_age(folder, heartbeat)
    if age is not None and age < _STALE:
        log.info("%s owns the run %s: waiting to see whether it lives", _described(owner), folder)
    while age is not None and age < _STALE:
        time.sleep(min(1.0, _STALE - age + 0.05))
        now, age = _heartbeat_age(folder, heartbeat)
        if now is not None and now != last:
            return True
    return False


def _heartbeat_age(folder: Path, heartbeat: Path) -> tuple[int | None, float | None]:
    """When a heartbeat was last renewed (ns) and how long that is ago (s), both by the file system's own clock; None
    when its file is gone. Raises OSError where the file system does not say."""
    probe = folder / f".owner.{secrets.token_hex(4)}.partial"
    try:
        with heartbeat.open("rb") as file:  # opening it has NFS ask the server
            last = os.fstat(file.fileno()).st_mtime_ns
        probe.touch()
        now = probe.stat().st_mtime_ns
    except FileNotFoundError:
        return None, None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return last, (now - last) / 1e9


def _described(owner: dict[str, Any]) -> str:
    """For people: which start it is."""
    since = owner.get("since")
    when = ""
    if isinstance(since, int | float):
        with suppress(ValueError, OSError, OverflowError):
            when = f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}"
    if not isinstance(owner.get("pid"), int):
        return "another start"
    return f"another start (process {owner['pid']} on {owner.get('host')}{when})"


def _read(path: Path, raised: Container[int | None] = ()) -> dict[str, Any]:
    """What the lock says, nothing where it is not there or torn. `raised`: numbers of the OSErrors that are raised."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in raised:
            raise
        return {}
    return found if isinstance(found, dict) else {}
