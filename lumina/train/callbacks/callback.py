"""Callbacks: code of the user's that is called at fixed points of a run, on every rank that was given it.

    class StopBelow(Callback):
        def after_step(self, context: Context, result: StepResult) -> None:
            context.log("bits per token", result.loss / math.log(2))
            if result.loss < 2.0:
                context.stop("the loss is below 2")

    train(config, callbacks=[StopBelow()])

A callback sees figures and may ask for things; it gets no way to change what is trained on, or how. What it must leave
as it was (lumina.train.callbacks.unchanged) is compared around each call, and a change ends the run at once, without a
save, with an error that names the callback: resuming such a run would not end in the same weights (laws 1, 2 and 6).
An exception in a callback, on whichever rank, ends the run on all ranks with its name, after a save. A request to stop
or for a checkpoint that one rank makes is every rank's at one of the next steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lumina.config import UserError
from lumina.train.health import LayerFigures
from lumina.train.outcomes import Stop


@dataclass(frozen=True)
class StepResult:
    """A step's figures. step: from 1; loss: mean over the step's supervised tokens on all ranks, in nats; NaN
    without one; gradient_norm: before clipping; applied: False when the update was refused; tokens,
    supervised_tokens: of all ranks; layers: norms by layer, at the steps that `layer_stats_every` is set for, else
    None."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    applied: bool
    tokens: int
    supervised_tokens: int
    layers: Mapping[str, LayerFigures] | None = None


@dataclass(frozen=True)
class Context:
    """What a callback may know and ask for. step: optimizer steps done; rank and world as torch.distributed counts
    them."""

    step: int
    total_steps: int
    rank: int
    world: int
    folder: Path
    log: Callable[[str, float], None]
    stop: Callable[[str], None]
    request_checkpoint: Callable[[], None]


class Callback:
    """Override what you need. Every method is called on every rank that has the callback, but for `at_save`. None may
    take part in a collective: another rank may not have the callback.

    `context.log(name, value)` writes a number into metrics.jsonl (kind `callback`) and to the trackers, on rank 0;
    `context.stop(reason)` ends the run after a save, and `context.request_checkpoint()` has one saved, on all ranks at
    one of the next three steps."""

    def at_start(self, context: Context) -> None:
        """Before the first step of this start; `context.step` is what the run goes on from."""

    def before_step(self, context: Context) -> None:
        """Before the forward passes of step `context.step + 1`."""

    def after_step(self, context: Context, result: StepResult) -> None:
        """A step's figures are known: as a rule during the next step, between its backward passes and its update, so
        that nothing waits for the device (lumina.train.deferred)."""

    def at_evaluation(self, context: Context, loss: float) -> None:
        """After an evaluation; `loss`: mean over its supervised tokens, in nats."""

    def at_save(self, context: Context, path: Path) -> None:
        """The checkpoint `path` is whole and has its name. Rank 0 alone knows, and it alone calls this, at the step
        boundary after the writer has finished."""

    def at_end(self, context: Context, stop: Stop) -> None:
        """After the last step of this start and its save; not after an exception."""


class CallbackError(UserError):
    """A callback raised an exception, or changed what it must leave as it was."""
