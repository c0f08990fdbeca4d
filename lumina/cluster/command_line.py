"""The command by which a user launched this process's job, read from the processes above it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import psutil

_LAUNCHERS = frozenset({"deepspeed", "torchrun", "mpirun", "mpiexec", "mpiexec.hydra"})


def launch_command() -> list[str] | None:
    """The words of the outermost launcher's command line above this process: `deepspeed`, `torchrun`, `mpirun` or
    `lumina launch`. None where there is none, as under srun, or on a machine that the launcher reached from another."""
    found = None
    try:
        for process in psutil.Process().parents():
            found = typed(process.cmdline()) or found
    except psutil.Error:  # one of them ended meanwhile, or is somebody else's
        return found
    return found


def typed(argv: Sequence[str]) -> list[str] | None:
    """A process's command line as a user types it, without the interpreter of a script; None when it is no
    launcher's."""
    words = list(argv)
    if words and PurePath(words[0]).name.startswith("python"):
        del words[0]
        while words and words[0].startswith("-") and words[0] != "-m":
            del words[0]
        if words[:1] == ["-m"]:
            del words[0]
    if not words:
        return None
    name = PurePath(words[0]).name
    if name in _LAUNCHERS or (name == "lumina" and words[1:2] == ["launch"]):
        return [name, *words[1:]]
    return None
