"""Training under DeepSpeed: a run is built (build), trained step by step (loop), and goes on from its state (state).

The module itself can be called as its `train`: `from lumina import train` is then what a user means by it, whether or
not something else has imported this package before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.config import Config
    from lumina.train.agreement import LostRankError
    from lumina.train.callbacks import Callback, CallbackError, Context, StepResult
    from lumina.train.deepspeed import end_process
    from lumina.train.outcomes import Stop, StopKind
    from lumina.train.run import TrainedRun, refuse_rank, train, train_rank

_HOMES = {
    "Callback": "callbacks",
    "CallbackError": "callbacks",
    "Context": "callbacks",
    "LostRankError": "agreement",
    "StepResult": "callbacks",
    "Stop": "outcomes",
    "StopKind": "outcomes",
    "TrainedRun": "run",
    "end_process": "deepspeed",
    "refuse_rank": "run",
    "train": "run",
    "train_rank": "run",
}

__all__ = [
    "Callback",
    "CallbackError",
    "Context",
    "LostRankError",
    "StepResult",
    "Stop",
    "StopKind",
    "TrainedRun",
    "end_process",
    "refuse_rank",
    "train",
    "train_rank",
]

__getattr__ = names_of(__name__, _HOMES)


class _Callable(ModuleType):
    def __call__(self, config: Config, callbacks: Sequence[Callback] = ()) -> TrainedRun:
        from lumina.train.run import train

        return train(config, callbacks)


sys.modules[__name__].__class__ = _Callable
