"""Requests for a checkpoint: files in the run's folder by which another process, anywhere, asks the job that trains it.

`requests/save-ID.json` asks; the job takes it away and writes `requests/save-ID.answer.json`. Loads no torch.
"""

from __future__ import annotations

import json
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from lumina.config import UserError
from lumina.files import write_json

_FOLDER = "requests"


class SaveReply(TypedDict):
    """The checkpoint's step and path; error: why it was not written, empty when it was."""

    step: int
    path: str
    error: str


def request_save(run: Path, timeout: float) -> SaveReply:
    """Ask the job that trains the run in `run` for a checkpoint now, and wait for its reply, at most `timeout` seconds.
    Raises UserError when none comes."""
    folder = run / _FOLDER
    folder.mkdir(exist_ok=True)
    request = f"save-{secrets.token_hex(6)}"
    asked, replied = folder / f"{request}.json", _reply_path(run, request)
    write_json(asked, {"time": time.time()})
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if replied.exists():
                reply: Any = json.loads(replied.read_text())
                return SaveReply(step=reply["step"], path=reply["path"], error=reply["error"])
            time.sleep(0.1)
    finally:
        taken = not asked.exists()
        for file in (asked, replied):
            file.unlink(missing_ok=True)
    raise UserError(
        f"no checkpoint in {timeout:.0f} s: " + ("the job is still saving" if taken else "nothing trains this run now"),
        "A job looks for requests at each step; --timeout SECONDS waits longer for long steps.",
    )


def take_save_requests(run: Path) -> list[str]:
    """The requests made since the last call; their files are removed. For the job's rank 0."""
    found = []
    with suppress(OSError):
        for path in sorted((run / _FOLDER).glob("save-*.json")):
            if not path.name.endswith(".answer.json"):
                path.unlink()
                found.append(path.stem)
    return found


def reply_to_save(run: Path, request: str, reply: SaveReply) -> None:
    """Write the reply to a request. One whose asker has gone is dropped."""
    with suppress(OSError):
        write_json(_reply_path(run, request), reply)


def _reply_path(run: Path, request: str) -> Path:
    return run / _FOLDER / f"{request}.answer.json"
