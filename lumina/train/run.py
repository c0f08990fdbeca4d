"""Trains a run from its configuration to its end, in the process group that the launcher described."""

from __future__ import annotations

from collections.abc import Sequence

from lumina.config import Config
from lumina.model import keep_heap
from lumina.train.build import build
from lumina.train.callbacks import Callback
from lumina.train.deepspeed import destroy_process_group, init_process_group
from lumina.train.determinism import set_deterministic
from lumina.train.loop import fit


def train(config: Config, callbacks: Sequence[Callback] = ()) -> int:
    """Train as `config` says, on however many ranks the launcher started. Returns the exit code: 0 when the run is
    complete, signals.EXIT_STOPPED when a signal stopped it after a save. `callbacks`: see lumina.train.callbacks."""
    keep_heap()
    if config.deterministic:
        set_deterministic()
    ranks = init_process_group()
    code = fit(build(config, ranks, callbacks))
    destroy_process_group()
    return code
