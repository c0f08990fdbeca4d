"""Processes that tell of themselves, so that another one can find out whether they are still there.

What a process writes of itself (`this_process`) is looked at by another one on the same machine, or by one elsewhere,
which learns that it cannot tell. This imports nothing of the package, so that every room can use it.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


def this_process() -> dict[str, Any]:
    """Where this process runs: host, machine (and its boot), pid, and when it began."""
    return {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid(), "started": _start(os.getpid())}


def is_there(process: Mapping[str, Any]) -> bool | None:
    """Whether a process is there that `this_process` described; None for one on another machine."""
    if process.get("machine") != machine():
        return None
    return process.get("started") is not None and _start(process.get("pid")) == process["started"]


def how_it_ended(exit_code: int) -> str:
    """An exit code as subprocess gives it, for people: `exit code 9`, or `SIGSEGV`."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def machine() -> str:
    """The machine, its boot and its process-ID namespace: where these are the same, process IDs mean the same."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start(pid: Any) -> float | None:
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
