"""Lumina: trains conversational transformers with DeepSpeed, from one CPU core to a cluster.

    from lumina import generate, load_config, train

docs/api.md has every name. They are loaded on first use: this import takes neither torch nor pydantic.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lumina.api import (
        evaluate,
        export,
        generate,
        import_model,
        load_config,
        load_model,
        prepare,
        train,
    )
    from lumina.config import Config, UserError
    from lumina.train import Callback, CallbackError, Context, StepResult, TrainedRun

__version__ = "0.2.0"

_HOMES = {
    **dict.fromkeys(("Config", "UserError"), "config"),
    **dict.fromkeys(("Callback", "CallbackError", "Context", "StepResult", "TrainedRun"), "train"),
    **dict.fromkeys(("evaluate", "export", "generate", "import_model", "load_config", "load_model", "prepare"), "api"),
}

__all__ = [
    "Callback",
    "CallbackError",
    "Config",
    "Context",
    "StepResult",
    "TrainedRun",
    "UserError",
    "__version__",
    "evaluate",
    "export",
    "generate",
    "import_model",
    "load_config",
    "load_model",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # the room, which can be called
        return import_module("lumina.train")
    if name in _HOMES:
        return getattr(import_module(f"lumina.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
