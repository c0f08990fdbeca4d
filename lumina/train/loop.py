"""Training loop: the order of steps, evaluations, saves and recovery. What it calls is elsewhere."""

from __future__ import annotations

import logging
import socket
import time
import traceback
from contextlib import ExitStack, suppress
from functools import partial

import torch.distributed as dist

from lumina.config import UserError, user_error
from lumina.data import Loader
from lumina.files import FormatError
from lumina.train.agreement import LostRankError, assert_lock_held
from lumina.train.build import Run
from lumina.train.deepspeed import set_collective_timeout
from lumina.train.evaluate import evaluate
from lumina.train.liveness.watchdog import report_failure
from lumina.train.liveness.watching import watch_passes
from lumina.train.outcomes import Fail, HalveMicroBatch, Outcome, Rewind, Stop, StopKind
from lumina.train.outputs.ending import interrupted, resuming_command, stopping
from lumina.train.outputs.samples import sample_answers
from lumina.train.recovery import apply
from lumina.train.recovery.last_word import RestartError
from lumina.train.step import record_last, settle, take_step

log = logging.getLogger("lumina")


def fit(run: Run) -> int:
    """Train to the end of the run, and close it. Returns the exit code: 0, or that of the reason that ended it early
    (lumina.train.outcomes.Stop), or 1 when its last checkpoint could not be written."""
    with ExitStack() as closing:  # in the order from bottom to top
        if run.lock is not None:
            closing.callback(run.lock.release)
        closing.enter_context(run.outputs)
        closing.callback(run.saves.stop_waiting, 5.0)
        closing.callback(set_collective_timeout)
        closing.enter_context(run.watchdog)
        closing.callback(_record_what_is_there, run)
        try:
            run.callbacks.at_start()
            run.stop.announce, run.stop.interruptible = partial(_announce, run), False
            if run.state.step >= run.data.total_steps:
                run.outputs.say(f"Nothing is left to train: the run is complete at step {run.state.step}.")
                run.outputs.end("finished", run.state.step, "")
                run.callbacks.at_end(Stop(StopKind.FINISHED))
                return 0
            return _end(run, _train(run))
        except BaseException as met:
            error = _cause(run, met)
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            run.outputs.end(state, run.state.step, f"{type(error).__name__}: {error}")
            if isinstance(error, KeyboardInterrupt):
                run.outputs.say(interrupted(run.folder, run.usual_world, run.state.step, run.saves.last_begun))
            _emergency(run, error)
            if error is met:
                raise
            raise error from None


def _train(run: Run) -> Stop:
    """To the end of the run: one pass through the data after another, each from where the state stands."""
    while True:
        stop = _carry_out(run, _steps(run))
        if stop is not None:
            return stop


def _carry_out(run: Run, outcome: Outcome) -> Stop | None:
    """Act upon what a step led to: recovery's actions change the state, and training goes on from there."""
    match outcome:
        case Fail():
            raise outcome.error
        case Rewind():
            apply.rewind(run, outcome)
            return None
        case HalveMicroBatch():
            apply.halve(run, outcome)
            return _carry_out(run, outcome.then)
    return outcome


def _steps(run: Run) -> Outcome:
    """Steps in their order, until one leads to something else."""
    watch_passes(run.watchdog, run.state.engine)
    timer = run.state.engine.timer
    timer.lap()  # what came before is no step's
    for data in timer.waits(_loader(run)):
        outcome = take_step(run, data)
        last = run.state.step == run.data.total_steps
        if outcome is None:
            outcome = _between_steps(run, last)
        if outcome is None and last:
            outcome = Stop(StopKind.FINISHED)
        if outcome is not None:
            return outcome
        with timer.phase("saving"):
            run.saves.at_step()
        _tell_of_saves(run)
    raise AssertionError("the data ends with the last step")


def _between_steps(run: Run, last: bool) -> Outcome:
    """What is done at some steps only: comparing the ranks, and evaluating."""
    run.outputs.profile_step()
    step, outcome = run.state.step, None
    evaluating = run.data.evaluation is not None and (last or step % run.config.eval_every_n_batches == 0)
    if run.saves.due() or last or evaluating or run.stragglers.due(step):  # a backup may be due at the last step too
        outcome = settle(run)  # these wait for the device anyway
    if isinstance(outcome, Rewind | Fail):
        return outcome
    comparison = run.stragglers.compare(step)
    if comparison is not None:
        run.outputs.ranks(step, comparison)
    if evaluating:
        outcome = _evaluate(run) or outcome
    return outcome


def _evaluate(run: Run) -> Stop | None:
    """Evaluate, keep the best checkpoint, and stop when patience has run out."""
    assert run.data.evaluation is not None
    engine, config, heartbeat = run.state.engine, run.config, run.watchdog.heartbeat
    began = time.perf_counter()
    with engine.timer.phase("evaluation"):
        progress = partial(run.outputs.progress, "Evaluating")
        found = evaluate(engine, run.data.evaluation, config.batch_size, run.ranks, heartbeat, progress)
    loss, figures, by_position = found
    run.outputs.evaluation(run.state.step, loss, time.perf_counter() - began, figures, by_position)
    with engine.timer.phase("evaluation"):
        if config.sample_prompts:
            asked, longest = run.data.sample_prompts, config.sample_tokens
            run.outputs.samples(run.state.step, sample_answers(engine, run.data.tokenizer, asked, longest, heartbeat))
        run.callbacks.at_evaluation(loss)
    if run.state.note_evaluation(loss):
        run.saves.best()
        return None
    why = run.state.out_of_patience(config.early_stopping_patience)
    return None if why is None else Stop(StopKind.EARLY_STOPPING, why)


def _announce(run: Run, signal: str) -> None:
    """A signal asks the run to stop: said at once, and carried out at the next step."""
    run.outputs.say(stopping(signal, run.state.step, run.saves.last_begun))


def _loader(run: Run) -> Loader:
    return Loader(
        run.data.train,
        run.data.order,
        rank=run.ranks.data_rank,
        world=run.ranks.data_world,
        part=run.ranks.part,
        micro_batch_size=run.config.batch_size,
        start_step=run.state.step,
        stop_step=run.data.total_steps,
        replace_corrupt=run.config.on_corrupt_sample == "zero_weight",
        vocab_size=run.config.vocab_size,
        device=run.state.engine.device,
    )


def _tell_of_saves(run: Run) -> None:
    for path in run.saves.written():
        run.callbacks.at_save(path)


# --- The end --------------------------------------------------------------------------------------


def _end(run: Run, stop: Stop) -> int:
    """Save what there is, and the exit code: a run whose last checkpoint could not be written has failed."""
    step, done = run.state.step, stop.finished or run.state.step == run.data.total_steps
    assert_lock_held(run.ranks, run.lock)
    saved = run.saves.finish()
    if not saved:
        assert_lock_held(run.ranks, run.lock)
    _tell_of_saves(run)
    unsaved = "" if saved else f"the checkpoint of step {step} could not be written; the newest one is older"
    if unsaved:
        log.error("%s", unsaved)
    elif stop.kind is not StopKind.FINISHED:
        then = "" if done else f" To go on: {resuming_command(run.folder, run.usual_world)}"
        run.outputs.say(f"Stopped at step {step}: {stop.reason}. The checkpoint is saved.{then}")
    if saved and done:
        best = run.state.trainer_state
        found = None if best.best_loss is None or best.best_step is None else (best.best_loss, best.best_step)
        run.outputs.summary(step, found)
    state = "failed" if unsaved else "finished" if done else "stopped"
    run.outputs.end(state, step, "; ".join(filter(None, (stop.reason, unsaved))))
    if stop.error is not None:
        raise stop.error
    run.callbacks.at_end(stop)
    return stop.exit_code if saved else 1


def _cause(run: Run, met: BaseException) -> BaseException:
    """The exception that ends the run on this rank: what it met itself, or where that is the loss of another rank, what
    that one has left behind it. What this rank alone may have met it leaves to the others."""
    if isinstance(met, UserError | RestartError):
        run.recovery.last_word.leave(met)
    elif isinstance(met, Exception) and _lost_a_rank(met):
        return run.recovery.last_word.found() or met
    elif isinstance(met, OSError | FormatError | UnicodeError):  # it may pass, so no rank ends as by a user's mistake
        why = f"rank {run.ranks.rank} on {socket.gethostname()} has ended: {user_error(met).message}"
        run.recovery.last_word.leave(RestartError(why))
    return met


def _emergency(run: Run, error: BaseException) -> None:
    """Before an exception ends the run: tell the launcher, and save where that can be. Not where the user must do
    something first, nor where the ranks do not stand together."""
    if isinstance(error, UserError) or not isinstance(error, Exception):
        return
    if isinstance(error, RestartError):
        report_failure(str(error))
        return
    why = f"{type(error).__name__}: {error}"
    report_failure(why, "".join(traceback.format_exception(error)))
    run.watchdog.heartbeat("emergency checkpoint")
    alone = _lost_a_rank(error)
    with suppress(Exception):  # what ended the run is what the user must hear of
        record_last(run, wait=not alone)
    run.saves.emergency(why, alone=alone, rewinding=run.recovery.rewinding)


def _lost_a_rank(error: Exception) -> bool:
    """Whether an exception says that another rank's process is gone: then no checkpoint of all ranks can be made."""
    # The backends raise plain RuntimeErrors: only gloo's and NCCL's own texts tell a lost peer from another error.
    gone = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "ncclRemoteError")
    return isinstance(error, dist.DistError | LostRankError) or any(sign in str(error) for sign in gone)


def _record_what_is_there(run: Run) -> None:
    """At the very end, whatever ended the run."""
    try:
        record_last(run, wait=False)
    except Exception as error:  # what ended the run is what the user must hear of, and the rest is to be closed
        log.error("the record of the last step is lost: %s: %s", type(error).__name__, error)
