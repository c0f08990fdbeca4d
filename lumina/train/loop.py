"""The training loop. Everything it calls is elsewhere; what is here is the order of things."""

from __future__ import annotations

import hashlib
import logging
import math
import time
import traceback
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lumina.cluster.signals import EXIT_RESIZE, EXIT_STOPPED
from lumina.config import UserError
from lumina.data import StepData
from lumina.data.order import sample_sums, samples_id
from lumina.monitor.record import perplexity
from lumina.train.answers import Rewind, StartAgainError
from lumina.train.evaluate import evaluate
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
            run.saves.emergency(f"{type(error).__name__}: {error}", run.sound, alone=_lost_a_rank(error))
            raise


def _lost_a_rank(error: Exception) -> bool:
    """Whether an exception says that another rank's process is gone: then no checkpoint of all ranks can be made."""
    gone = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "ncclRemoteError")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in gone)


def _train(run: Run) -> int:
    """From the run's progress to its end, or to an answer that sets it back."""
    timer = run.engine.timer
    timer.split()  # what came before is no step's
    for data in timer.waits(run.loader()):
        stop = _step(run, data)
        run.profile_step()
        run.compare_ranks()
        last = run.progress.step == run.total_steps
        if run.eval_data is not None and (last or run.due(run.config.eval_every_n_batches)):
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
    """One optimizer step on one global batch. Returns why the run must stop, if it must, agreed between all ranks."""
    step, began, timer = data.step + 1, time.perf_counter(), run.engine.timer
    if run.answers.passes(step):
        run.answers.pass_by(data)
        return None
    lr = run.schedule(data.step)
    run.engine.set_lr(lr)
    loss, failure = _accumulate(run, data)
    computed = time.perf_counter()
    run.watchdog.beat(f"step {step}, update")
    flags = (*run.stop.flags, *run.saves.flags, float(failure is not None), len(data.corrupt))
    own = loss.new_tensor((*flags, *sample_sums(data.own_samples)), dtype=torch.float64)
    shared = torch.cat((loss.double()[None] / run.ranks.world, own))
    with timer.phase("communication"):
        dist.all_reduce(shared)
        mean_loss, stopping, resizing, busy, asked, backup, failed, corrupt, *sums = shared.tolist()
    if failed:
        run.answers.shrink(step, data.samples, failure)
    run.saves.agree(busy, asked, backup)
    if corrupt:
        run.answers.note_corrupt(data)
    with timer.phase("optimizer"):
        grad_norm, applied = _update(run, data, run.answers.limit(mean_loss))
    ended = time.perf_counter()
    run.stragglers.add(computed - began, ended - computed)
    verdict = run.answers.judge(mean_loss, grad_norm)
    run.record(data, mean_loss, lr, grad_norm, applied, verdict, ended - began, samples_id(*sums))
    run.answers.after_update(data, mean_loss, grad_norm, applied, verdict)
    if stopping:
        return f"signal {run.stop.signal or 'on another rank'}"
    return "resize" if resizing else None


def _accumulate(run: Run, data: StepData) -> tuple[torch.Tensor, str | None]:
    """Forward and backward of this rank's micro-batches: its loss, and what failed when memory ran out in a way that
    all ranks can answer together."""
    step, scale = data.step + 1, run.ranks.world / data.supervised_tokens  # the engine averages over ranks: law 2
    loss = torch.zeros((), dtype=torch.float32, device=run.engine.device)
    failure, run.engine.collectives = None, False
    if run.config.lora_dropout:
        torch.manual_seed(_draw(run.config.seed, step, run.ranks.rank))
    try:
        for number, batch in enumerate(data.micro_batches, 1):
            run.watchdog.beat(f"step {step}, micro-batch {number}")
            loss += run.engine.accumulate(batch.torch(), scale, last=number == len(data.micro_batches))
    except torch.OutOfMemoryError as error:
        if not run.config.answer_out_of_memory:
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


def _update(run: Run, data: StepData, limit: float) -> tuple[float, bool]:
    """The optimizer's step, and the layers' statistics around it where they are due."""
    step = data.step + 1
    stats = run.layer_stats(step)
    if stats is not None:
        stats.before()
    run.sound = False
    run.saves.before_update()
    try:
        grad_norm, applied = run.engine.step(limit)
    except torch.OutOfMemoryError as error:
        if not run.config.answer_out_of_memory:
            raise
        run.answers.update_ran_out(step, data.samples, str(error).splitlines()[0])
    run.progress.step, run.sound = step, True
    if stats is not None and applied:
        run.record_layers(step, stats.after())
    return grad_norm, applied


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
