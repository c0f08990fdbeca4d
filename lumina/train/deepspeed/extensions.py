"""DeepSpeed's compiled operators: built once, by one process, whatever locks a killed build left.

torch guards a build by a plain file, `lock`, that a killed process leaves behind, and every later start then waits for
it for ever (torch.utils.file_baton, torch 2.13), or finds half of a library once somebody has removed it. Here builds
are made one at a time under a lock that the kernel takes away from the dead, a `lock` that no process has open is
removed, and what was not loaded once from its folder, or has changed since, is built anew. The folder is one for each
environment: two that share one rebuild each other's operators at every start.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lumina.files import read_text, write_json

_MARK = ".lumina-whole"
_held = threading.local()


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
                with _whole(folder / builder.name):
                    builder.load(verbose=False)


def guard(builder: Any) -> None:
    """Have the operators that DeepSpeed loads by itself built in the same way. `builder`: its class OpBuilder."""
    original = builder.jit_load
    if getattr(original, "guarded", False):
        return

    def jit_load(self: Any, verbose: bool = True) -> Any:
        with _alone() as folder:
            _remove_stale_locks(folder)
            with _whole(folder / self.name):
                return original(self, verbose)

    jit_load.guarded = True  # type: ignore[attr-defined]
    builder.jit_load = jit_load


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """An operator's folder, empty where its last build may not have been finished, and marked once the block, which
    builds and loads it, has ended well."""
    mark = folder / _MARK
    building = (folder / "lock").exists()  # by a process that has it open, which torch waits for
    if folder.is_dir() and not building and _state(folder) != _read(mark):
        shutil.rmtree(folder)
    yield
    if folder.is_dir():
        write_json(mark, _state(folder))


def _state(folder: Path) -> dict[str, list[int]]:
    """The libraries in a folder, with size and time."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.so"))}


def _read(mark: Path) -> Any:
    try:
        return json.loads(read_text(mark))
    except (OSError, ValueError):
        return None


@contextmanager
def _alone() -> Iterator[Path]:
    """One process at a time per folder of operators; within it again at once."""
    inside: Path | None = getattr(_held, "folder", None)
    if inside is not None:
        yield inside
        return
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "lumina" / "extensions" / environment)))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lumina-build").open("w", encoding="utf-8") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        _held.folder = folder
        try:
            yield folder
        finally:
            _held.folder = None


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
