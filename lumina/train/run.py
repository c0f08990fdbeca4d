"""Trains a run from its configuration to its end, in the process group that the launcher described."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lumina.cluster import EXIT_STOPPED, StoppedEarly, handlers_kept, outliving_readers
from lumina.config import Config, UserError, user_error
from lumina.files import FormatError
from lumina.model import keep_heap
from lumina.monitor import read_metrics
from lumina.terminal import say
from lumina.train.agreement import agree_on_start, heartbeats, refuse_start
from lumina.train.build import Run, build
from lumina.train.callbacks import Callback
from lumina.train.deepspeed import destroy_process_group, end_process, init_process_group
from lumina.train.determinism import set_deterministic
from lumina.train.loop import fit

_REFUSAL_PATIENCE = 60.0  # seconds in which the other ranks join


@dataclass(frozen=True)
class TrainedRun:
    """A run after `train`. folder: where everything of it is; exit_code: 0 when it is complete or a callback ended it,
    75 when a signal stopped it after a save (76 when that asked for another world size), 1 when its last checkpoint
    could not be written."""

    folder: Path
    exit_code: int

    @property
    def finished(self) -> bool:
        """Whether nothing but the run itself, or a callback, ended it."""
        return self.exit_code == 0

    def metrics(self, kind: str | None = "step") -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl in order: step, eval, layers, ranks, system, callback; None for every kind."""
        for record in read_metrics(self.folder / "metrics.jsonl"):
            if kind is None or record.get("kind") == kind:
                yield record


def train(config: Config, callbacks: Sequence[Callback] = ()) -> TrainedRun:
    """Train as `config` says: in this process alone, or on every rank where a launcher has started several. The process
    goes on as it was, with the signal handlers and the memory that it had, and may train again: its process group
    stays, because DeepSpeed keeps hold of it.

    Raises:
        UserError: what the user can put right.
        CallbackError: a callback failed, or changed what it must leave as it was.
    """
    try:
        with handlers_kept(), outliving_readers():
            code = _fit_and_release(_build(config, callbacks))
    except StoppedEarly as stopped:
        signal.raise_signal(stopped.number)  # for the handlers that the process had
        raise
    finally:
        gc.collect()  # an engine is full of cycles, and its memory may be a GPU's
    return TrainedRun(Path(config.output_dir) / config.experiment_name, code)


def train_rank(config: Config) -> int:
    """Run one rank: train, leave the process group, and return the exit code (see TrainedRun)."""
    with outliving_readers():
        try:
            run = _build(config, ())
        except StoppedEarly as stopped:
            return _end_early(stopped)
        code = fit(run)
        destroy_process_group()
    return code


def _end_early(stopped: StoppedEarly) -> int:
    """A signal came before the first step. 75 says that there is a checkpoint to go on from; where none is, the signal
    itself ends the process."""
    say(f"{stopped}: nothing was trained, nothing is lost", file=sys.stderr, flush=True)
    if not stopped.saved:
        signal.signal(stopped.number, signal.SIG_DFL)
        signal.raise_signal(stopped.number)
        return 128 + stopped.number  # a container's first process has no default action
    return EXIT_STOPPED


def refuse_rank(error: UserError) -> NoReturn:
    """End one rank's start by what it met before it could join the others: they would wait for it, and raise it too."""
    end = threading.Timer(_REFUSAL_PATIENCE, _end_alone, [error])
    end.daemon = True
    end.start()
    refuse_start(error, init_process_group())
    raise error


def _end_alone(error: UserError) -> None:
    """The others do not come either."""
    say(f"error: {error}", file=sys.stderr)
    end_process(2)


def _build(config: Config, callbacks: Sequence[Callback]) -> Run:
    keep_heap()
    if config.deterministic:
        set_deterministic()
    ranks = init_process_group()
    try:
        with heartbeats(ranks):
            agree_on_start(config, ranks)
            return build(config, ranks, callbacks)
    except (ConnectionError, TimeoutError):  # of another rank
        raise
    except (OSError, FormatError, UnicodeError) as error:
        raise user_error(error) from error


def _fit_and_release(run: Run) -> int:
    """`fit`, and then nothing of DeepSpeed's or torch's holds the engine. After an exception only where this rank is
    alone: closing an engine waits for its device, which may wait for a rank that is gone."""
    try:
        code = fit(run)
    except BaseException:
        if run.ranks.world == 1:
            with suppress(Exception):  # what ended the run is what the user must hear of
                run.state.engine.close()
        raise
    run.state.engine.close()
    return code
