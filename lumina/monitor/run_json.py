"""RUN/run.json, the record of a run's starts: how each was started, with what code, on what, and how it ended."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from lumina.config import UserError, upgrade, usable_cpus
from lumina.files import read_json, write_json

_PACKAGES = ("torch", "deepspeed", "triton", "numpy", "pyarrow", "tiktoken", "flash-attn")


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says: {config, data_fingerprint, starts: [...]}; empty where there is none or it is torn."""
    try:
        found = read_json(folder / "run.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def add_start(folder: Path, config: Mapping[str, Any], data_fingerprint: str, **facts: Any) -> None:
    """Append a start. `facts` are the resumed step, total steps, world size, nodes and the like."""
    run = read_run(folder)
    starts = run.get("starts", [])
    with suppress(UserError):  # a file that was edited by hand must not stop a run
        run["config"] = upgrade(run.get("config", {}), "run.json", warn=False)
    before = run.get("config", {})
    changed = {key: value for key, value in config.items() if starts and before.get(key) != value}
    starts.append(
        {
            "time": time.time(),
            **facts,
            "changed": changed,  # settings that differ from the start before
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "directory": os.getcwd(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "code": code_version(),
            "environment": environment(),
        }
    )
    _write(folder, {"config": dict(config), "data_fingerprint": data_fingerprint, "starts": starts})


def add_end(folder: Path, state: str, step: int, reason: str = "") -> None:
    """Say of the last start how it ended: finished, stopped or failed."""
    run = read_run(folder)
    if run.get("starts"):
        run["starts"][-1]["end"] = {"time": time.time(), "state": state, "step": step, "reason": reason}
        _write(folder, run)


def _write(folder: Path, run: Mapping[str, Any]) -> None:
    write_json(folder / "run.json", run, sort_keys=False, ensure_ascii=False, durable=False)


def code_version() -> dict[str, Any]:
    """Lumina's version, and the commit where it runs from a git checkout; `changed` when files differ from it."""
    from lumina import __version__

    root = Path(__file__).parents[2]
    version: dict[str, Any] = {"lumina": __version__}
    if not (root / ".git").exists():
        return version

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        version["commit"] = git("rev-parse", "HEAD")
        version["changed"] = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):  # no git, or not its owner
        pass
    return version


def environment() -> dict[str, Any]:
    """Versions of what the run depends on, and the devices it sees."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "cuda": torch.version.cuda,
        "cpus": len(usable_cpus()),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    job = {name: value for name, value in os.environ.items() if name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST")}
    return found | ({"slurm": job} if job else {})
