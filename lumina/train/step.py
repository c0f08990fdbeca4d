"""One optimizer step on one global batch, and what its numbers lead to once they are read.

The functions here are the inner half of the loop (lumina.train.loop). What a step leads to other than the next one is
returned as a value (lumina.train.outcomes), which the loop acts upon.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lumina.data import StepData, sample_sums, samples_id
from lumina.model import expert_balance
from lumina.train.agreement import StepSums, assert_lock_held, entry, pack, send
from lumina.train.build import Run
from lumina.train.callbacks import StepResult
from lumina.train.deepspeed import LayerStats, scale_exhausted
from lumina.train.deferred import StepTaken, UpdateNumbers
from lumina.train.outcomes import Fail, HalveMicroBatch, Outcome, Rewind, Stop, StopKind
from lumina.train.outputs.outputs import StepFigures, used_memory
from lumina.train.outputs.throughput import step_flops

# --- A step ---------------------------------------------------------------------------------------


def take_step(run: Run, data: StepData) -> Outcome:
    """One optimizer step on one global batch, whose numbers are read during the next one. Returns what the numbers of
    the step before lead to, if not to this step: then no update is made."""
    state, step, timer = run.state, data.step + 1, run.state.engine.timer
    if run.recovery.skips(data):
        outcome = settle(run)
        if outcome is None:  # the step counts as done without an update
            state.trainer_state.step = step
            run.recovery.skipped(data)
        return outcome
    run.callbacks.before_step()
    lr = run.schedule(data.step)
    state.engine.set_lr(lr)
    own, action = accumulate(run, data)
    if isinstance(action, Fail):
        return action
    if action is not None:
        return replace(action, then=settle(run))
    run.watchdog.heartbeat(f"step {step}, update")
    sums, experts = _sums(run, data, own)
    outcome = settle(run)
    if outcome is not None:
        return outcome
    with timer.phase("optimizer"):
        loss, corrupt = entry(StepSums, sums, "loss"), entry(StepSums, sums, "corrupt")
        updated = update(run, data, run.recovery.norm_limit(data, loss, corrupt))
    if isinstance(updated, HalveMicroBatch | Fail):
        return updated
    norm, applied = updated
    run.deferred.put(state.engine, data, lr, sums, norm, applied, experts)
    # From here on a checkpoint of this step can be made: what its spike detector and its record need is under way.
    state.trainer_state.step, state.consistent = step, True
    _measure_layers(run, step, applied)
    return None


def accumulate(run: Run, data: StepData) -> tuple[Tensor, HalveMicroBatch | Fail | None]:
    """Forward and backward of this rank's micro-batches: its loss and the objective's figures (float32, 1 + F), and
    what comes of running out of memory, if it did."""
    step, engine = data.step + 1, run.state.engine
    # The engine averages over ranks: law 2. Where nothing is supervised the gradient is 0, not 0 / 0.
    scale = run.ranks.world / max(1.0, data.supervised_tokens)
    sums = torch.zeros(1 + len(engine.figures), dtype=torch.float32, device=engine.device)
    failure, engine.collectives = None, False
    engine.take_routing_counts()  # of a step that was given up
    if run.config.lora_dropout:
        torch.manual_seed(_dropout_seed(run.config.seed, step, run.ranks.rank))
    try:
        for number, batch in enumerate(data.micro_batches, 1):
            run.watchdog.heartbeat(f"step {step}, micro-batch {number}")
            sums += engine.accumulate(batch.torch(), scale, last=number == len(data.micro_batches))
            batch.made = None  # its memory on the device, which a step's record would keep to the next update
    except torch.OutOfMemoryError as error:
        if run.config.on_oom == "fail":
            raise
        failure = str(error).splitlines()[0]
    if failure is None:
        run.recovery.micro_batches_done(step)
        return sums, None
    return sums, run.recovery.out_of_memory_in_micro_batches(step, data.samples, failure, clean=not engine.collectives)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """What is dropped in a step is a function of these alone, so that a resumed run drops the same (law 6), on a GPU
    too, whose generator no checkpoint holds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "little")


def _sums(run: Run, data: StepData, own: Tensor) -> tuple[Tensor, Tensor | None]:
    """Over all ranks: the step's `StepSums`, packed, after them the objective's figures, and the bytes in use and the
    bytes there are of each rank, of which a sum would say nothing; and the expert balance where there are experts; on
    the device. own: as `accumulate` returns it."""
    memory = [0.0] * (2 * run.ranks.world)
    memory[2 * run.ranks.rank : 2 * run.ranks.rank + 2] = map(float, used_memory(own.device))
    figures = own[1:].double() / run.ranks.world
    sums = torch.cat((pack(_own_sums(run, data, own[0]), own.device), figures, send(memory, own.device)))
    count, counts = len(sums), run.state.engine.take_routing_counts()
    if counts is not None:
        sums = torch.cat((sums, counts))
    with run.state.engine.timer.phase("communication"):
        dist.all_reduce(sums)
    return sums[:count], None if counts is None else expert_balance(sums[count:], run.config)


def _own_sums(run: Run, data: StepData, loss: Tensor) -> StepSums:
    """What this rank contributes to the step's sums."""
    count, high, low = sample_sums(data.own_samples)
    stop, resize = run.stop.flags
    writing, checkpoint, backup = run.saves.flags
    return StepSums(
        loss=loss.double() / run.ranks.world,
        stop=stop,
        resize=resize,
        writing=writing,
        checkpoint=checkpoint,
        backup=backup,
        corrupt=len(data.corrupt),
        lock_lost=float(run.lock is not None and not run.lock.held()),
        callback_stop=float(run.callbacks.stop_reason is not None),
        callback_failed=float(run.callbacks.failure is not None),
        sample_count=count,
        sample_high=high,
        sample_low=low,
        flops=step_flops(run.config, data.micro_batches),
    )


def update(run: Run, data: StepData, limit: Tensor) -> tuple[Tensor, Tensor] | HalveMicroBatch | Fail:
    """The optimizer's step, refused by the engine where the gradient norm is above `limit`; before it, the first half
    of the layers' statistics where they are due. Returns the norm before clipping and whether the update was made, on
    the device; or what comes of running out of memory."""
    step = data.step + 1
    stats = _layer_stats(run, step)
    if stats is not None:
        stats.before()
    run.state.consistent = False
    run.saves.before_update()
    try:
        return run.state.engine.step(limit)
    except torch.OutOfMemoryError as error:
        if run.config.on_oom == "fail":
            raise
        failure = str(error).splitlines()[0]
    return run.recovery.out_of_memory_in_update(step, data.samples, failure)


def _layer_stats(run: Run, step: int) -> LayerStats | None:
    """The layers' statistics, at the steps that are due for them."""
    every = run.config.layer_stats_every
    if not every or step % every:
        return None
    if run.layers is None:
        run.layers = LayerStats(run.state.engine)
    return run.layers


def _measure_layers(run: Run, step: int, applied: Tensor) -> None:
    """The second half of the layers' statistics, after the update."""
    stats = _layer_stats(run, step)
    if stats is None:
        return
    with run.state.engine.timer.phase("optimizer"):
        if bool(applied):
            figures = stats.after()
            run.deferred.keep_layers(figures)
            run.outputs.layers(step, figures)


# --- Its numbers ----------------------------------------------------------------------------------


def settle(run: Run) -> Stop | Rewind | Fail | None:
    """Read the numbers of the step before, if there is one, and say what they lead to; the same on every rank."""
    taken = run.deferred.take()
    if taken is None:
        return None
    update_numbers, sums, means = taken.read()
    if sums.lock_lost:  # before anything of the step is written
        assert_lock_held(run.ranks, run.lock)
    if sums.corrupt >= len(taken.data.samples):  # nothing was left to be supervised
        nothing = np.zeros_like(taken.data.shares)
        taken = replace(taken, data=replace(taken.data, supervised_tokens=0.0, shares=nothing))
    run.saves.agree(sums.writing, sums.checkpoint, sums.backup)
    if sums.corrupt:
        run.recovery.note_corrupt(taken.data)
    figures = _record(run, taken, update_numbers, sums, means)
    action = run.recovery.action(run.saves.drain)
    if action is not None:
        return action
    run.callbacks.after_step(_result(figures, taken))
    return _stop(run, sums)


def record_last(run: Run, wait: bool) -> None:
    """After an exception: what is known of the step is recorded, and nothing else is done. Not collective. With `wait`
    false only if the numbers are there: the device may never come to them."""
    taken = run.deferred.take()
    if taken is not None and (wait or taken.numbers.ready()):
        _record(run, taken, *taken.read())


def _record(
    run: Run, taken: StepTaken, update_numbers: UpdateNumbers, sums: StepSums, means: Sequence[float]
) -> StepFigures:
    """The step's record, its health, and its place in the baselines or among the refused ones."""
    engine, split = run.state.engine, taken.times.read()
    norm, applied = update_numbers.norm, bool(update_numbers.applied)
    known = bool(taken.data.supervised_tokens)
    loss = sums.loss if known else math.nan
    of_objective = {name: mean if known else math.nan for name, mean in zip(engine.figures, means, strict=True)}
    computing = split["forward"] + split["backward"]
    waiting = split["communication"] + split.get("exchange", 0.0) + split["optimizer"]
    run.stragglers.add(computing, waiting, step_flops(run.config, taken.data.micro_batches))
    anomaly = run.state.spikes.classify(loss, norm) if taken.data.supervised_tokens else None
    loss_scale, samples = update_numbers.scale if engine.fp16 else None, samples_id(*sums.samples)
    figures = StepFigures(
        taken.data,
        loss,
        taken.lr,
        norm,
        applied,
        anomaly,
        split,
        samples,
        taken.ended,
        loss_scale,
        of_objective,
        taken.experts,
        taken.times.exchanged or None,
        flops=sums.flops / run.ranks.world,
        memory=taken.memory,
        memory_total=taken.memory_total,
    )
    try:
        run.outputs.step(figures)
    finally:  # the update was made, whatever became of its record: a checkpoint's baselines know of it
        run.recovery.after_update(taken.data, loss, norm, applied, anomaly)
    if update_numbers.exhausted:
        raise scale_exhausted(f"step {taken.data.step + 1}: ")
    return figures


def _result(figures: StepFigures, taken: StepTaken) -> StepResult:
    data = figures.data
    return StepResult(
        step=data.step + 1,
        loss=figures.loss,
        learning_rate=figures.lr,
        gradient_norm=figures.grad_norm,
        applied=figures.applied,
        tokens=data.tokens,
        supervised_tokens=int(data.supervised_tokens),
        layers=taken.layers,
    )


def _stop(run: Run, sums: StepSums) -> Stop | None:
    """Whether the run must stop, agreed between all ranks; collective where a callback is the cause."""
    if sums.callback_failed:
        error = run.callbacks.agreed_failure()
        return Stop(StopKind.CALLBACK_FAILED, str(error), error)
    if sums.stop:
        return Stop(StopKind.SIGNAL, f"signal {run.stop.signal or 'on another rank'}")
    if sums.resize:
        return Stop(StopKind.RESIZE, f"resize, signal {run.stop.signal or 'on another rank'}")
    if sums.callback_stop:
        return Stop(StopKind.CALLBACK, run.callbacks.agreed_reason())
    return None
