"""Callbacks: code of the user's that a run calls at fixed points."""

from lumina.train.callbacks.callback import Callback, CallbackError, Context, StepResult
from lumina.train.callbacks.calls import Callbacks

__all__ = ["Callback", "CallbackError", "Callbacks", "Context", "StepResult"]
