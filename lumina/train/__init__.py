"""Training under DeepSpeed: a run is built (build), trained step by step (loop), and goes on from its state (state)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lumina.config import Config

if TYPE_CHECKING:
    from lumina.train.callbacks import Callback, CallbackError, Context, StepResult
    from lumina.train.outcomes import Stop, StopKind

_HOMES = {
    **dict.fromkeys(("Callback", "CallbackError", "Context", "StepResult"), "callbacks"),
    **dict.fromkeys(("Stop", "StopKind"), "outcomes"),
}


def train(config: Config, callbacks: Sequence[Callback] = ()) -> int:
    """Train as `config` says and return the exit code. See lumina.train.run."""
    from lumina.train.run import train as run

    return run(config, callbacks)


def end_process(code: int) -> int:
    """End the process of a rank whose training returned `code`. See lumina.train.deepspeed.startup."""
    from lumina.train.deepspeed import end_process as end

    return end(code)


def __getattr__(name: str) -> Any:
    """The rest, which needs torch, on first use."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Callback", "CallbackError", "Context", "StepResult", "Stop", "StopKind", "end_process", "train"]
