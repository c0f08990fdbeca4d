"""The hostfile: which machines, and how many ranks on each, in DeepSpeed's format: lines of `NAME slots=N`."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lumina.config import UserError
from lumina.files import read_text

_LINE = re.compile(r"(?P<name>\S+)(?:\s+slots\s*=\s*(?P<slots>\d{1,6}))?", re.ASCII)
# Nothing that ssh takes for an option (-x), or pdsh for several machines (n1,n2 and n[1-2]).
_NAME = re.compile(r"(?:\w[\w.-]*@)?\w[\w.-]*", re.ASCII)
_PORT = re.compile(r"(?P<name>[^:]+):\d+")


@dataclass(frozen=True)
class Host:
    """A machine by the name that ssh and the other machines know it by; `slots` ranks run on it (one for each GPU)."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a file, in its order, which becomes the order of ranks.

    Raises UserError naming the line for anything else than `NAME slots=N`, a name given twice, and an empty file.
    """
    try:
        lines = read_text(path, most=1 << 20).splitlines()
    except OSError as error:
        raise UserError(f"cannot read the hostfile {path}: {error.strerror}", "Give --hostfile FILE.") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        slots = int(found["slots"] or 1) if found else 0
        if found and (port := _PORT.fullmatch(found["name"])):
            raise UserError(
                f"{path}, line {number}: {found['name']} names a port",
                f"A machine's port of ssh belongs into ~/.ssh/config (Host {port['name']}, Port …); ranks are written: "
                f"{port['name']} slots=N",
            )
        if found is None or slots < 1 or not _is_name(found["name"]):
            raise UserError(f"{path}, line {number}: {text!r} is not a host", "Write a line like: node1 slots=8")
        if any(host.name == found["name"] for host in hosts):
            raise UserError(f"{path}, line {number}: {found['name']} is there twice", "One line for each host.")
        hosts.append(Host(found["name"], slots))
    if not hosts:
        raise UserError(f"{path} names no host", "Write a line like: node1 slots=8")
    return hosts


def _is_name(text: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(text))
    return _NAME.fullmatch(text) is not None
