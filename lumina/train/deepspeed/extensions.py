"""DeepSpeed's compiled operators: built once, by one process, whatever locks a killed build left.

torch guards a build by a plain file, `lock`, that a killed process leaves behind, and every later start then waits for
it for ever (torch.utils.file_baton, torch 2.13). Here builds are made one at a time under a lock that the kernel takes
away from the dead, and a `lock` that no process has open is removed. The folder is one for each environment: two that
share one rebuild each other's operators at every start.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def build(builders: Iterable[Any]) -> None:
    """Build and load these DeepSpeed operators (op_builder instances); DeepSpeed then finds them loaded."""
    # This environment's own ninja, whatever else is on PATH: another version does not read the log that it left, and
    # builds everything anew (a minute, and again when the first one comes back).
    own = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join((own, os.environ.get("PATH", os.defpath)))
    with _alone() as folder:
        for builder in builders:
            _remove_stale_locks(folder)
            if builder is not None and builder.is_compatible(verbose=False):
                builder.load(verbose=False)


@contextmanager
def _alone() -> Iterator[Path]:
    """One process at a time per folder of operators."""
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "lumina" / "extensions" / environment)))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lumina-build").open("w", encoding="utf-8") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield folder


def _remove_stale_locks(folder: Path) -> None:
    for lock in folder.glob("*/lock"):
        if not is_open(lock):
            lock.unlink(missing_ok=True)


def is_open(path: Path, proc: Path = Path("/proc")) -> bool:
    """Whether any process of this machine that we may look at has `path` open (Linux; elsewhere taken to be so)."""
    if not proc.is_dir():
        return True
    wanted = str(path.resolve())
    for process in proc.glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry.path) == wanted for entry in os.scandir(process)):
                return True
        except OSError:  # it has ended, or is another user's
            continue
    return False
