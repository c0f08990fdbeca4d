"""Steps that a tokenizer's process makes for a test."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path


def stop_here(folder: Path) -> str:
    """Stops the process until a SIGCONT, as a batch system may."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return folder.name


def end_here(folder: Path, number: int) -> None:
    """Ends the process by a signal: as a library that crashes does, or a kernel without memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), number)
