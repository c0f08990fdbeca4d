"""The hostfile: which machines, and how many ranks on each, in DeepSpeed's format: lines of `NAME slots=N`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lumina.config import UserError

_LINE = re.compile(r"^(?P<name>[^\s-]\S*)(?:\s+slots\s*=\s*(?P<slots>\d+))?$", re.ASCII)  # ssh takes -x for an option


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
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the hostfile {path}: {error.strerror}", "Give --hostfile FILE.") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.match(text)
        slots = int(found["slots"] or 1) if found else 0
        if found is None or slots < 1:
            raise UserError(f"{path}, line {number}: {text!r} is not a host", "Write a line like: node1 slots=8")
        if any(host.name == found["name"] for host in hosts):
            raise UserError(f"{path}, line {number}: {found['name']} is there twice", "One line for each host.")
        hosts.append(Host(found["name"], slots))
    if not hosts:
        raise UserError(f"{path} names no host", "Write a line like: node1 slots=8")
    return hosts
