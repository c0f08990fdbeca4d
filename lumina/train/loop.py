"""The training loop. Everything it calls is elsewhere; what is here is the order of things."""

from __future__ import annotations

import hashlib
import logging
import math
import time
import traceback
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lumina.cluster import EXIT_RESIZE, EXIT_STOPPED
from lumina.config import UserError
from lumina.data import StepData, sample_sums
from lumina.monitor import perplexity
from lumina.train.deferred import send
from lumina.train.evaluate import evaluate
from lumina.train.recovery.recovery import Rewind, StartAgainError
from lumina.train.watchdog import report_failure

if TYPE_CHECKING:
    from lumina.train.run import Run


log = logging.getLogger("lumina")

_EXIT_CODES = {"signal": EXIT_STOPPED, "resize": EXIT_RESIZE}


def fit(run: Run) -> int:
    """Train to the end of the run. Returns the exit code: 0, or EXIT_STOPPED when a signal ended it early."""
    while True:
        try:
            return _train(run)
        except Rewind:  # an answer set the state back: go on from there
            continue
        except UserError:
            raise
        except StartAgainError as error:
            report_failure(str(error))
            raise
        except Exception as error:
            report_failure(f"{type(error).__name__}: {error}", traceback.format_exc())
            run.watchdog.beat("emergency checkpoint")
            alone = _lost_a_rank(error)
            with suppress(Exception):  # what ended the run is what the user must hear of
                run.deferred.note(wait=not alone)
            run.saves.emergency(f"{type(error).__name__}: {error}", run.sound, alone)
            raise


def _lost_a_rank(error: Exception) -> bool:
    """Whether an exception says that another rank's process is gone: then no checkpoint of all ranks can be made."""
    gone = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "ncclRemoteError")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in gone)


def _train(run: Run) -> int:
    """From the run's progress to its end, or to an answer that sets it back."""
    timer = run.engine.timer
    timer.lap()  # what came before is no step's
    for data in timer.waits(run.loader()):
        stop = _step(run, data)
        last = run.progress.step == run.total_steps
        if stop is None:
            run.profile_step()
            evaluating = run.eval_data is not None and (last or run.due(run.config.eval_every_n_batches))
            if last or evaluating or run.saves.due() or run.stragglers.due(run.progress.step):
                stop = run.deferred.settle()  # these wait for the device anyway
            run.compare_ranks()
            if evaluating:
                stop = _evaluate(run) or stop
        if last or stop:
            return _end(run, stop)
        with timer.phase("saving"):
            run.saves.at_step()
    return 0


def _end(run: Run, stop: str | None) -> int:
    """Save what there is, and the exit code: a run whose last checkpoint could not be written has failed."""
    if not run.saves.finish():
        log.error("the checkpoint of step %d could not be written; the newest one is older", run.progress.step)
        return 1
    if stop:
        run.console.say(f"Stopped at step {run.progress.step}: {stop}. The checkpoint is saved.")
        return _EXIT_CODES.get(stop.split(" ")[0], 0)
    return 0


def _step(run: Run, data: StepData) -> str | None:
    """One optimizer step on one global batch, whose numbers are left to lumina.train.deferred. Returns why the run must
    stop, if it must, agreed between all ranks: then before the update, at the end of the step before."""
    step, timer = data.step + 1, run.engine.timer
    if run.answers.passes(step):
        stop = run.deferred.settle()
        if stop is None:
            run.answers.pass_by(data)
        return stop
    lr = run.schedule(data.step)
    run.engine.set_lr(lr)
    loss, failure = _accumulate(run, data)
    if failure is not None:
        stop = run.deferred.settle(partial(run.answers.shrink, step, data.samples, failure))
        if stop is None:
            raise Rewind
        return stop
    run.watchdog.beat(f"step {step}, update")
    flags = (*run.stop.flags, *run.saves.flags, len(data.corrupt))
    shared = torch.cat(
        (loss.double()[None] / run.ranks.world, send([*flags, *sample_sums(data.own_samples)], loss.device))
    )
    with timer.phase("communication"):
        dist.all_reduce(shared)
    stop = run.deferred.settle()
    if stop is not None:
        return stop
    with timer.phase("optimizer"):
        norm, applied = _update(run, data, run.answers.limit(shared[0]))
    run.deferred.put(data, lr, shared, norm, applied)
    # From here on a checkpoint of this step can be made: what its guard and its record need is under way.
    run.progress.step, run.sound = step, True
    stats = run.layer_stats(step)
    if stats is not None:
        with timer.phase("optimizer"):
            if bool(applied):
                run.record_layers(step, stats.after())
    return None


def _accumulate(run: Run, data: StepData) -> tuple[torch.Tensor, str | None]:
    """Forward and backward of this rank's micro-batches: its loss, and what failed when memory ran out in a way that
    all ranks answer together."""
    step, scale = data.step + 1, run.ranks.world / data.supervised_tokens  # the engine averages over ranks: law 2
    loss = torch.zeros((), dtype=torch.float32, device=run.engine.device)
    failure, run.engine.collectives = None, False
    if run.config.lora_dropout:
        torch.manual_seed(_draw(run.config.seed, step, run.ranks.rank))
    try:
        for number, batch in enumerate(data.micro_batches, 1):
            run.watchdog.beat(f"step {step}, micro-batch {number}")
            loss += run.engine.accumulate(batch.torch(), scale, last=number == len(data.micro_batches))
            batch.made = None  # its memory on the device, which a step's record would keep to the next update
    except torch.OutOfMemoryError as error:
        if run.config.on_oom == "fail":
            raise
        failure = str(error).splitlines()[0]
    if failure is None:
        run.answers.tell(step, "done")
    elif not run.answers.all_ran_out(step, clean=not run.engine.collectives):
        run.answers.give_up_memory(step)
    return loss, failure


def _draw(seed: int, step: int, rank: int) -> int:
    """The seed of a step's dropout: what is dropped is a function of these alone, so that a resumed run drops the same
    (law 6), on a GPU too, whose generator no checkpoint holds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "little")


def _update(run: Run, data: StepData, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The optimizer's step; before it, the first half of the layers' statistics where they are due."""
    step, failure = data.step + 1, None
    stats = run.layer_stats(step)
    if stats is not None:
        stats.before()
    run.sound = False
    run.saves.before_update()
    try:
        norm, applied = run.engine.step(limit)
    except torch.OutOfMemoryError as error:
        if run.config.on_oom == "fail":
            raise
        failure = str(error).splitlines()[0]
    if failure is not None:  # here, where no traceback and no statistics hold the engine that is to be given up
        stats = None
        run.answers.update_ran_out(step, data.samples, failure)
    return norm, applied


def _evaluate(run: Run) -> str | None:
    """Evaluate, keep the best checkpoint, and say whether patience has run out."""
    assert run.eval_data is not None
    began = time.perf_counter()
    with run.engine.timer.phase("evaluation"):
        loss = evaluate(run.engine, run.eval_data, run.config.batch_size, run.ranks, run.watchdog.beat)
    progress = run.progress
    run.record_evaluation(loss, perplexity(loss), time.perf_counter() - began)
    with run.engine.timer.phase("evaluation"):
        run.answer_samples()
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = loss, progress.step, 0
        run.saves.best()
        return None
    progress.evaluations_without_gain += 1
    patience = run.config.early_stopping_patience
    if patience is not None and progress.evaluations_without_gain >= patience:
        return f"no better evaluation in {patience} (best {progress.best_loss:.4f} at step {progress.best_step})"
    return None
