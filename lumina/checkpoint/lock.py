"""Run lock: only the newest process group may write here, and none takes the run from a start that lives.

Every start of a run writes a token of its own to `.owner.json`, with where and since when it runs; a process that finds
another token there has lost the lock, ends, and writes nothing more. While it runs it renews the time of its heartbeat
file, `.owner-TOKEN`, and removes it at its end.

A start is refused while an earlier one lives: on the same machine, while its process is there; on another one, while
its heartbeat goes on, by the clock of the file system. It takes the lock from one whose heartbeat has stopped: a node
that was cut off or suspended can wake up long after its job was restarted elsewhere, and must then end by itself.
Within one launch (`job`) the newest start gets the lock at once: the launcher has ended the one before, or cannot
reach it. The job also says whether a start goes on by itself: a restart by the same launch does, a new launch must be
told to with --resume.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lumina.config import UserError, user_error
from lumina.files import read_json, write_json

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
        owner = {**_this_process(), "since": time.time()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._heartbeat.touch()
            before = f".owner-{_read(self._path).get('token')}"
            write_json(self._path, {"token": self.token, "job": launch, "global_batch_size": global_batch, **owner})
        except OSError as error:
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
    """Raises UserError while an earlier start of the run lives, unless it was made by the same launch. Writes nothing;
    may wait for a minute to see whether a heartbeat on another machine goes on."""
    try:
        found = _read(folder / NAME, _PASSING | {errno.EACCES, errno.EPERM})
    except OSError as error:  # whether another start lives is not known
        raise user_error(error) from error
    if not found or (launch is not None and found.get("job") == launch):
        return
    if _lives(folder, found):
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
    """Whether the last start of the run in `folder` lives, as far as can be told at once; None where there is none."""
    owner = _read(folder / NAME)
    if not owner:
        return None
    lives = _lives_here(folder, owner)
    if lives is not None:
        return lives
    _, age = _heartbeat_age(folder, folder / f".owner-{owner.get('token')}")
    return age is not None and age < _STALE


def _owner(folder: Path, token: str) -> dict[str, Any]:
    """What the lock says; `token` while it cannot be read and nothing tells of another one."""
    try:
        return _read(folder / NAME, _PASSING)
    except OSError:
        return {"token": token}


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
    """The same launch, or that of a Slurm job which was queued again since."""
    if before == launch:
        return True
    names = [_SLURM.fullmatch(name) for name in (str(before), launch)]
    earlier, later = (name and (name["job"], name["restarts"]) for name in names)
    return bool(earlier and later and earlier[0] == later[0] and earlier[1] != later[1])


# --- Whether a start lives ------------------------------------------------------------------------


def _lives_here(folder: Path, owner: dict[str, Any]) -> bool | None:
    """None for a start on another machine, of which a heartbeat is there."""
    if not (folder / f".owner-{owner.get('token')}").exists():  # it ended, or is of a version that had none
        return False
    if owner.get("machine") != _machine():
        return None
    return owner.get("started") is not None and _process_start(owner.get("pid")) == owner["started"]


def _lives(folder: Path, owner: dict[str, Any]) -> bool:
    here = _this_process()
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
    when its file is gone."""
    probe = folder / f".owner.{secrets.token_hex(4)}.partial"
    try:
        with heartbeat.open("rb") as file:  # opening it has NFS ask the server
            last = os.fstat(file.fileno()).st_mtime_ns
        probe.touch()
        now = probe.stat().st_mtime_ns
    except OSError:
        return None, None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return last, (now - last) / 1e9


def _this_process() -> dict[str, Any]:
    """Where this process runs, so that another one can tell whether it is still there."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
    }


def _machine() -> str:
    """The machine, its boot and its process-ID namespace: where these are the same, process IDs mean the same."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(pid: Any) -> float | None:
    """When a process began, by a clock that nobody sets where there is one; None for one that is not there or only
    waits for its parent to take note of its end."""
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])  # field 22: clock ticks since boot
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


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
