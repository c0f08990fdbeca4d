"""The launch that a process belongs to: what tells a restart by the same launcher from a start by another one."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from contextlib import suppress

import psutil


def own_launch(environment: Mapping[str, str] = os.environ) -> str | None:
    """The name of `lumina launch`'s job, or of the torchrun agent that started this process: the run's id is no name
    (`none` by default, and people keep the same one), so it is the agent's process. None for what is started once."""
    if "LUMINA_JOB" in environment:
        return environment["LUMINA_JOB"]
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    agent = os.getppid()
    parts = [environment["TORCHELASTIC_RUN_ID"], socket.gethostname(), str(agent)]
    with suppress(psutil.Error):
        parts.append(str(psutil.Process(agent).create_time()))
    return f"torchrun-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"
