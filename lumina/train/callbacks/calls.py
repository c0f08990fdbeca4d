"""Calls a rank's callbacks, and keeps what they ask for until the ranks agree on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lumina.data import GlobalOrder
from lumina.train.callbacks.callback import Callback, CallbackError, Context, StepResult
from lumina.train.callbacks.unchanged import changes, observe
from lumina.train.deepspeed import Ranks
from lumina.train.outcomes import Stop
from lumina.train.outputs.outputs import Outputs
from lumina.train.state import RunState

log = logging.getLogger("lumina")


class Callbacks:
    """Calls the callbacks of one rank, and keeps what they ask for until the ranks agree on it."""

    def __init__(
        self,
        callbacks: Sequence[Callback],
        ranks: Ranks,
        folder: Path,
        total_steps: int,
        state: RunState,
        order: GlobalOrder,
        outputs: Outputs,
        request_checkpoint: Callable[[], None],
        heartbeat: Callable[[str], None],
    ) -> None:
        """`request_checkpoint`: of the saves; `heartbeat`: of the watchdog, called before each callback."""
        self._callbacks = list(callbacks)
        self._ranks, self._folder, self._total_steps = ranks, folder, total_steps
        self._state, self._order, self._outputs = state, order, outputs
        self._request_checkpoint, self._heartbeat = request_checkpoint, heartbeat
        self._logged: dict[str, float] = {}
        self._logged_at = 0
        self._anywhere = False  # whether any rank has callbacks
        self.stop_reason: str | None = None  # this rank's, for the sum over ranks
        self.failure: str | None = None

    # --- The points at which they are called ---

    def at_start(self) -> None:
        """Collective, as `at_end` is."""
        counts: list[Any] = [None] * self._ranks.world
        dist.all_gather_object(counts, len(self._callbacks))
        self._anywhere = any(counts)
        self._call("at_start")
        self._raise_agreed()

    def before_step(self) -> None:
        self._flush()
        self._call("before_step")

    def after_step(self, result: StepResult) -> None:
        self._call("after_step", result)

    def at_evaluation(self, loss: float) -> None:
        self._call("at_evaluation", loss)

    def at_save(self, path: Path) -> None:
        self._call("at_save", path)

    def at_end(self, stop: Stop) -> None:
        self._call("at_end", stop)
        self._flush()
        self._raise_agreed()

    # --- What they ask for, agreed between the ranks ---

    def agreed_reason(self) -> str:
        """Why callbacks ask to stop; collective."""
        return "; ".join(dict.fromkeys(filter(None, self._gather(self.stop_reason)))) or "a callback"

    def agreed_failure(self) -> CallbackError:
        """What went wrong in callbacks, on every rank that it did; collective."""
        found = [f"rank {rank}: {text}" for rank, text in enumerate(self._gather(self.failure)) if text]
        return _failed("; ".join(found))

    def _raise_agreed(self) -> None:
        """A failure that no step's sum has told of; collective."""
        if self._anywhere and any(self._gather(self.failure)):
            raise self.agreed_failure()

    def _gather(self, own: str | None) -> list[str | None]:
        found: list[Any] = [None] * self._ranks.world
        dist.all_gather_object(found, own)
        return found

    # --- Calling ---

    def _call(self, method: str, *arguments: object) -> None:
        if not self._callbacks or self.failure is not None:
            return  # after a failure the run is about to end
        for callback in self._callbacks:
            if getattr(type(callback), method) is getattr(Callback, method):
                continue
            name = f"{type(callback).__name__}.{method}"
            self._heartbeat(f"callback {name}")
            before = observe(self._state.engine, self._order)
            try:
                with before.writes():
                    getattr(callback, method)(self._context(), *arguments)
            except Exception as error:
                log.exception("%s raised an exception", name)
                self.failure = f"{name} raised {type(error).__name__}: {error}"
            found = changes(before, self._state.engine, self._order)
            if found:
                self._state.consistent = False
                raise CallbackError(
                    f"step {self._state.step}: the callback {name} changed {', '.join(found)}",
                    "A callback must leave these as they are, or the run could not be resumed to the same weights. "
                    "Nothing was saved; go on from the last checkpoint with --resume auto.",
                )
            if self.failure is not None:
                return

    def _context(self) -> Context:
        return Context(
            self._state.step,
            self._total_steps,
            self._ranks.rank,
            self._ranks.world,
            self._folder,
            self._log,
            self._stop,
            self._request_checkpoint,
        )

    def _log(self, name: str, value: float) -> None:
        """Kept until the step is over: a tracker takes one record of a kind and step."""
        if self._logged_at != self._state.step:
            self._flush()
        self._logged_at = self._state.step
        self._logged[str(name)] = float(value)

    def _flush(self) -> None:
        logged, self._logged = self._logged, {}
        if logged:
            self._outputs.callback_values(self._logged_at, logged)

    def _stop(self, reason: str) -> None:
        self.stop_reason = self.stop_reason or str(reason)


def _failed(what: str) -> CallbackError:
    return CallbackError(what, "Mend the callback, then go on from the run's last checkpoint with --resume auto.")
