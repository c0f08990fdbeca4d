"""The state of a run: what a checkpoint saves, and nothing else that training goes on from (law 6).

Weights, moments and fp16's loss scale are in the engine; the step, the best evaluation and what the run depends on are
in the trainer's state; the spike detector has the baselines of loss and gradient norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lumina.checkpoint import Snapshot, StagingBuffer, TrainerState, read_trainer_state
from lumina.config import Config
from lumina.train.deepspeed import Engine
from lumina.train.recovery.spikes import SpikeDetector
from lumina.train.saving import snapshot
from lumina.train.saving.snapshot import OnProgress, silent


@dataclass
class RunState:
    """One per rank. consistent: False while an update is being made, when weights and moments may be of two steps."""

    engine: Engine
    trainer_state: TrainerState
    spikes: SpikeDetector
    consistent: bool = True

    @property
    def step(self) -> int:
        """Optimizer steps done, which is also the position in the data (law 1)."""
        return self.trainer_state.step

    def note_evaluation(self, loss: float) -> bool:
        """Whether an evaluation of this state is the best so far; one that is not finite never is."""
        best = self.trainer_state
        if math.isfinite(loss) and (best.best_loss is None or loss < best.best_loss):
            best.best_loss, best.best_step, best.evaluations_without_gain = loss, self.step, 0
            return True
        best.evaluations_without_gain += 1
        return False

    def out_of_patience(self, patience: int | None) -> str | None:
        """Why to stop early: the last `patience` evaluations, or more, were no better than the best one."""
        best = self.trainer_state
        if patience is None or best.evaluations_without_gain < patience:
            return None
        found = "none was finite" if best.best_loss is None else f"best {best.best_loss:.4f} at step {best.best_step}"
        return f"no better evaluation in {patience} ({found})"

    def snapshot(self, copies: StagingBuffer) -> Snapshot:
        """Begin to copy all of it into host memory, for a checkpoint; not collective. See
        lumina.train.saving.snapshot.take_snapshot."""
        self.trainer_state.guard = self.spikes.state()
        return snapshot.take_snapshot(self.engine, self.trainer_state, copies)

    def rewind(self, checkpoint: Path, config: Config, progress: OnProgress = silent) -> None:
        """Take the state of an earlier checkpoint of this start or of one before; collective."""
        trainer_state, trainer = read_trainer_state(checkpoint)
        self.engine.discard()  # the gradients of the step that was begun
        self.consistent = False
        snapshot.load_checkpoint(checkpoint, self.engine, trainer, progress)
        now = self.trainer_state
        for name in ("world", "precision", "zero_stage", "rotary_angles"):
            setattr(trainer_state, name, getattr(now, name))
        self.trainer_state, self.spikes = trainer_state, SpikeDetector(config, trainer_state.guard)
        self.consistent = True
