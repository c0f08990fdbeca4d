"""Carries out what recovery decided: goes back to a checkpoint, or rebuilds the engine for a smaller micro-batch."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from lumina import checkpoint
from lumina.checkpoint import TrainerState
from lumina.train.agreement import assert_lock_held
from lumina.train.build import Run
from lumina.train.deepspeed import restore_engine, snapshot_engine
from lumina.train.make_engine import make_engine
from lumina.train.outcomes import HalveMicroBatch, Rewind
from lumina.train.torch_private import empty_host_cache


def rewind(run: Run, action: Rewind) -> None:
    """Take the state of an earlier checkpoint, skip the steps that were refused, and record anew from there;
    collective."""
    step = run.state.step
    assert_lock_held(run.ranks, run.lock)  # checkpoints lose their names below
    run.recovery.remember_rewind(action)
    run.state.rewind(action.checkpoint, run.config, partial(run.outputs.progress, "Loading"))
    if run.ranks.main:
        _discard_later(action.checkpoint, run.state.trainer_state)
    run.outputs.rewind(run.state.step)
    run.saves.rewound()
    run.recovery.rewound(action, step)
    dist.barrier()


def _discard_later(target: Path, trainer_state: TrainerState) -> None:
    """Checkpoints made amid the trouble would be resumed from: they lose their names. Rank 0 only."""
    folder = target.parent
    for path in checkpoint.list_checkpoints(folder):
        if checkpoint.step_of(path) > trainer_state.step:
            checkpoint.discard(path)
    best = trainer_state.best_step
    if best is not None and trainer_state.best_loss is not None and (folder / checkpoint.name_of(best)).is_dir():
        checkpoint.record_best(folder, best, trainer_state.best_loss)
    else:
        (folder / checkpoint.BEST).unlink(missing_ok=True)


def halve(run: Run, action: HalveMicroBatch) -> None:
    """Rebuild the engine for half the micro-batch and twice the accumulation; collective. The global batch, its order
    and its loss stay as they are (laws 1 and 2)."""
    run.saves.drain()
    run.recovery.remember_micro_batch(action.batch_size)
    _rebuild(run, action.batch_size)
    run.recovery.halved(action)


def _rebuild(run: Run, batch_size: int) -> None:
    """A fresh engine for another micro-batch with the weights and optimizer state of this one. What the old one had
    half done, and the memory that it held, is gone: nothing but the state may hold it."""
    state = run.state
    snapshot, rng = snapshot_engine(state.engine), torch.get_rng_state()
    state.engine.close()
    del state.engine
    run.layers = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        empty_host_cache()  # pinned buffers of the old model's offloaded inputs
    run.settings = run.settings.with_micro_batch(batch_size, run.ranks.world)
    state.engine = make_engine(run.settings, drawn=False)
    restore_engine(state.engine, snapshot)
    torch.set_rng_state(rng)
