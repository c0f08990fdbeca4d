"""The state of a run: what a checkpoint saves, and nothing else that training goes on from (law 6).

Weights, moments and fp16's loss scale are in the engine; the step, the best evaluation and what the run depends on are
in the progress; the spike detector has the baselines of loss and gradient norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lumina.checkpoint import Snapshot, StagingBuffer, TrainerState, read_trainer_state
from lumina.config import Config
from lumina.train import snapshot
from lumina.train.deepspeed.engine import Engine
from lumina.train.recovery.spikes import SpikeDetector


@dataclass
class TrainingState:
    """One per rank. consistent: False while an update is being made, when weights and moments may be of two steps."""

    engine: Engine
    progress: TrainerState
    spikes: SpikeDetector
    consistent: bool = True

    @property
    def step(self) -> int:
        """Optimizer steps done, which is also the position in the data (law 1)."""
        return self.progress.step

    def snapshot(self, copies: StagingBuffer) -> Snapshot:
        """Begin to copy all of it into host memory, for a checkpoint; not collective. See
        lumina.train.snapshot.take."""
        self.progress.guard = self.spikes.state()
        return snapshot.take_snapshot(self.engine, self.progress, copies)

    def rewind(self, checkpoint: Path, config: Config) -> None:
        """Take the state of an earlier checkpoint of this start or of one before; collective."""
        progress, trainer = read_trainer_state(checkpoint)
        self.engine.discard()  # the gradients of the step that was begun
        self.consistent = False
        snapshot.load_checkpoint(checkpoint, self.engine, trainer)
        now = self.progress
        progress.world, progress.precision, progress.zero_stage = now.world, now.precision, now.zero_stage
        self.progress, self.spikes = progress, SpikeDetector(config, progress.guard)
        self.consistent = True
