"""Run lock: only the newest process group may write here.

A node that was cut off or stopped can wake up long after its job was restarted elsewhere. Its processes must not name a
checkpoint, remove one, or write to the log of the run any more. Every start of a run writes a token of its own to
`.owner.json`; a process that finds another token there has lost the lock. Nobody waits for it: the newest start always
gets it. The file also names the launch (`job`) that a start belongs to: a restart by the same launch goes on by itself,
a new launch must be told to with --resume.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from lumina.config import UserError
from lumina.files import write_json

NAME = ".owner.json"


class RunLock:
    """Taken by rank 0 when a run starts, from whichever start held it before."""

    def __init__(self, folder: Path, launch: str | None, global_batch: int) -> None:
        self._path = folder / NAME
        self.token = secrets.token_hex(8)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"token": self.token, "job": launch, "global_batch_size": global_batch})
        except OSError as error:
            raise UserError(
                f"the run's folder {folder} cannot be written: {error.strerror or error}",
                "Choose another --output-dir.",
            ) from error

    def held(self) -> bool:
        """Whether no later start has taken the lock."""
        return _read(self._path).get("token") == self.token

    def assert_held(self) -> None:
        """Raises UserError when a later start of the run has taken the lock."""
        if not self.held():
            raise UserError(
                f"another start of this run owns {self._path.parent} now; this process ends without touching it",
                "Two launches of one --experiment-name at a time? Give each its own.",
            )


def last_global_batch(folder: Path, launch: str | None) -> int | None:
    """The global batch of the run in `folder` if `launch` made its last start, else None."""
    found = _read(folder / NAME)
    return int(found["global_batch_size"]) if launch is not None and found.get("job") == launch else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
