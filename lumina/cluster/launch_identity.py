"""The launch that a process belongs to: what tells a restart by the same launcher from a start by another one, and how
many ranks the launch began with."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from contextlib import suppress

import psutil

FIRST_WORLD = "LUMINA_FIRST_WORLD"  # set by an agent for its ranks


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


def first_world(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks the first group of `lumina launch`'s job had: what a start goes by that comes after a node was
    lost, and before the run's own files say anything. None for what another launcher started."""
    given = environment.get(FIRST_WORLD)
    return None if given is None else int(given)
