"""Whole runs of `lumina train`: started as processes, broken, resumed and compared bit for bit.

processes.py starts them for other folders' tests too; this package hands it out.
"""

from tests.runs.processes import (
    DEEPSPEED,
    PATIENCE,
    ROOT,
    TINY,
    Job,
    Patch,
    Runs,
    State,
    arguments,
    clean_environment,
    differing,
    final,
    free_port,
    held_at,
    held_until,
    losses,
    newest,
    state,
    steps,
    write_conversations,
)

__all__ = [
    "DEEPSPEED",
    "PATIENCE",
    "ROOT",
    "TINY",
    "Job",
    "Patch",
    "Runs",
    "State",
    "arguments",
    "clean_environment",
    "differing",
    "final",
    "free_port",
    "held_at",
    "held_until",
    "losses",
    "newest",
    "state",
    "steps",
    "write_conversations",
]
