"""Recovery: what a run does about trouble by itself. It decides, and returns an action (lumina.train.outcomes) that the
loop carries out: going back after repeated spikes, smaller micro-batches after running out of memory, or the end.

Each action is bounded, alike on every rank, and in the event log. docs/health.md lists them. What must outlive the
process is in recovery.json (lumina.train.recovery.record).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumina import checkpoint
from lumina.config import MEMORY_SETTINGS, Config, UserError
from lumina.data import StepData
from lumina.monitor import EventLog
from lumina.train.agreement import decided_by_rank_0
from lumina.train.deepspeed import Ranks
from lumina.train.health import Health
from lumina.train.outcomes import Fail, HalveMicroBatch, Rewind
from lumina.train.recovery.last_word import LastWord, RestartError
from lumina.train.recovery.out_of_memory import StepReports
from lumina.train.recovery.record import RecoveryRecord
from lumina.train.recovery.spikes import NOT_FINITE, Anomaly, not_finite
from lumina.train.state import RunState

log = logging.getLogger("lumina")

_NEVER = -1.0  # a limit that no gradient norm keeps
_LEAST_IN_A_ROW = 30  # refused updates that end a run which may not go back: fewer may be of one stretch of its data


class Recovery:
    """Decides what is done about trouble: one per rank, for one start of the run."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        folder: Path,
        record: RecoveryRecord,
        state: RunState,
        events: EventLog,
        health: Health,
        may_write: Callable[[], bool] = lambda: True,
        memory: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """`config`: resolved, with the micro-batch that this start begins with; `folder`: the run's; `may_write`: false
        once another start owns it; `memory`: as in lumina.train.make_engine.Settings."""
        assert config.global_batch_size is not None
        self._config, self._ranks, self._folder = config, ranks, folder
        self._state, self._events, self._health = state, events, health
        self.record, self._may_write, self._memory = record, may_write, memory
        self._batch_size, self._global_batch = config.batch_size, config.global_batch_size
        answering = config.on_oom != "fail" and not state.engine.collective_forward
        self.last_word = LastWord(ranks, folder, may_write)
        self._reports = StepReports(ranks, answering, config.emergency_seconds)
        self._corrupt = 0  # samples of weight zero so far
        self._repeated: list[int] = []  # the refused steps that the run is to go back for
        self._finite = True  # loss and gradient norm of the last of them

    # --- Steps that are not trained on ---

    def skips(self, data: StepData) -> bool:
        """Whether this step's samples brought the run back: no update is made for it, then or at a later start."""
        return data.step + 1 in self.record.skipped_steps

    def skipped(self, data: StepData) -> None:
        """Take note of such a step."""
        reason = "its samples brought the run back"
        self._events.add(data.step + 1, "recovery", "info", "rollback", reason, "skipped", data.samples)

    def note_corrupt(self, data: StepData) -> None:
        """Some rank replaced samples of this step by ones of weight zero; collective."""
        found: list[Any] = [None] * self._ranks.world
        dist.all_gather_object(found, data.corrupt)
        samples = sorted({sample for part in found for sample in part})
        self._corrupt += len(samples)
        reason = f"{len(samples)} sample(s) of step {data.step + 1} cannot be read ({self._corrupt} so far)"
        action = "replaced by samples of weight zero"
        self._events.add(
            data.step + 1, "recovery", "warn", "corrupt-sample", reason, action, samples, count=self._corrupt
        )
        self._health.report("corrupt-sample", "warn", reason)

    # --- Refused updates, and going back ---

    def norm_limit(self, data: StepData, loss: Tensor, corrupt: Tensor) -> Tensor:
        """The limit on this step's gradient norm, above which the update is not made; -1, so that no update is made,
        when the loss is anomalous, or nothing is supervised: the gradient is zero then, and weight decay and moments
        would move all the same. `corrupt`: how many samples all ranks could not read. All float64, 0-dimensional, on
        the device."""
        if not data.supervised_tokens:  # by the index: every rank says the same
            return torch.full_like(loss, _NEVER)
        most, norm = math.inf, math.inf
        if self._config.on_spike != "warn":
            most, norm = self._state.spikes.loss_limit(), self._state.spikes.norm_limit()
        bad = ~(torch.isfinite(loss) & (loss <= most)) | (corrupt >= len(data.samples))
        return torch.full_like(loss, norm).masked_fill_(bad, _NEVER)

    def after_update(self, data: StepData, loss: float, norm: float, applied: bool, anomaly: Anomaly | None) -> None:
        """Take note of a step; not of one in which nothing is supervised. A refused one goes to the event log with its
        samples; after repeated ones `action` brings the run back."""
        if not data.supervised_tokens:
            return
        step, spikes = data.step + 1, self._state.spikes
        if applied:
            spikes.accept(loss, norm)
        if anomaly is None and applied:
            return
        rule, reason = anomaly or not_finite(loss, norm)
        action = "reported only" if applied else "update skipped on all ranks"
        self._events.add(step, "recovery", "warn", rule, reason, action, data.samples, loss=loss, grad_norm=norm)
        # fp16 looks for its loss scale by gradients that are not finite; a loss that is not has another cause.
        if applied or (self._state.engine.fp16 and rule == NOT_FINITE and math.isfinite(loss)):
            return
        refused, self._finite = spikes.refuse(step), math.isfinite(loss) and math.isfinite(norm)
        if self._goes_back:
            repeated = len(refused) >= self._config.rollback_after
        else:  # single steps among good ones are skipped and no more; but not for ever all of them
            repeated = spikes.refused_in_a_row >= max(self._config.health_check_interval, _LEAST_IN_A_ROW)
        if repeated:
            self._repeated = refused

    @property
    def _goes_back(self) -> bool:
        """Whether the run may go back at all."""
        return self._config.rollback_after > 0 and self._config.max_rollbacks > 0

    @property
    def rewinding(self) -> bool:
        """Whether the run is about to go back: the state that it stands at is given up."""
        return bool(self._repeated)

    def action(self, drain: Callable[[], object]) -> Rewind | Fail | None:
        """What repeated refused steps lead to, if there are any; collective, and the same on every rank. `drain` waits
        for the saves under way, which may be what the run can go back to."""
        refused, self._repeated = self._repeated, []
        config, step = self._config, self._state.step
        if not refused:
            return None
        if not self._goes_back:
            many = f"{self._state.spikes.refused_in_a_row} updates in a row were skipped"
            self._events.add(step, "recovery", "crit", "rollback", many, "the run ends: going back is off")
            return Fail(
                UserError(
                    f"step {step}: {many}, and the run may not go back",
                    "No update is made any more: look at the reasons in events.jsonl, then resume from an earlier "
                    "checkpoint or with a lower learning_rate; rollback_after and max_rollbacks above 0 have the run "
                    "go back by itself.",
                )
            )
        many = f"{len(refused)} updates were skipped within {config.health_check_interval} steps"
        if self.record.rollbacks >= config.max_rollbacks:
            self._events.add(step, "recovery", "crit", "rollback", many, "the run ends: no rollback is left")
            return Fail(
                UserError(
                    f"step {step}: {many}, after {self.record.rollbacks} rollbacks",
                    "Lower learning_rate or look at the samples in events.jsonl; max_rollbacks allows more tries.",
                )
            )
        drain()
        before = lambda: self._checkpoint_before(refused[0])
        target = decided_by_rank_0(self._ranks, before)
        if target is None:
            self._go_on(step, refused, many)
            return None
        return Rewind(target, refused, many)

    def _go_on(self, step: int, refused: list[int], many: str) -> None:
        """There is no checkpoint to go back to. Where the refused steps were all there were, it is not their samples
        but the weights, which no further refusal changes: limits that the weights are beyond would refuse every step
        to come. So the baselines are measured anew, and updates are clipped meanwhile; `max_rollbacks` bounds it."""
        done = "no earlier checkpoint: the run goes on"
        if self._state.spikes.refused_in_a_row >= len(refused):
            self.record.rollbacks += 1
            if self._ranks.main:
                self._write_record()
            if self._finite and self._config.max_grad_norm:
                self._state.spikes.measure_anew()
                done = f"{done}, its baselines measured anew and gradients clipped to {self._config.max_grad_norm:g}"
        self._events.add(step, "recovery", "warn", "rollback", many, done)
        self._state.spikes.forget_refused()

    def _checkpoint_before(self, step: int) -> Path | None:
        """The newest valid checkpoint from before step `step` was tried."""
        saved = checkpoint.list_checkpoints(self._folder / "checkpoints")
        return checkpoint.latest_valid([path for path in saved if checkpoint.step_of(path) < step])

    def remember_rewind(self, action: Rewind) -> None:
        """Before it is carried out."""
        self.record.rollbacks += 1
        self.record.skipped_steps = sorted({*self.record.skipped_steps, *action.skipped})
        if self._ranks.main:
            self._write_record()

    def rewound(self, action: Rewind, step: int) -> None:
        """After it was carried out at step `step`."""
        to, skipped = self._state.step, ", ".join(map(str, action.skipped))
        done = f"back to the checkpoint of step {to}; steps {skipped} are skipped"
        self._events.add(
            step,
            "recovery",
            "crit",
            "rollback",
            action.reason,
            done,
            to=to,
            skipped_steps=action.skipped,
            rollbacks=self.record.rollbacks,
        )

    # --- Out of memory ---

    def micro_batches_done(self, step: int) -> None:
        """This rank came through the micro-batches of step `step` (from 1)."""
        self._reports.report(step, self._batch_size, "done")

    def out_of_memory_in_micro_batches(
        self, step: int, samples: Iterable[int], failure: str, clean: bool
    ) -> HalveMicroBatch | Fail:
        """What comes of running out of memory in the micro-batches of a step. `clean`: this rank has begun no
        collective in it."""
        if self._reports.all_clean(step, self._batch_size, clean):
            return self._halve(step, samples, failure)
        return self._restart(step, "in the middle of a collective")

    def out_of_memory_in_update(self, step: int, samples: Iterable[int], failure: str) -> HalveMicroBatch | Fail:
        """What comes of running out of memory inside the update of a step. Where every rank did, at the same place and
        before anything was changed, the micro-batch is halved; otherwise some ranks have made the update, or wait for
        this one in a collective."""
        engine = self._state.engine
        if self._reports.all_stopped_alike(step, self._batch_size, engine.begun, engine.timer.collectives):
            self._state.consistent = True
            return self._halve(step, samples, failure)
        return self._restart(step, "inside the update")

    def _halve(self, step: int, samples: Iterable[int], failure: str) -> HalveMicroBatch | Fail:
        if self._batch_size == 1:
            return Fail(_no_smaller(self._config))
        return HalveMicroBatch(step, self._batch_size // 2, samples, failure)

    def _restart(self, step: int, where: str) -> Fail:
        """The ranks cannot agree within the step: the next start goes on from the last checkpoint, with half the
        micro-batch."""
        if self._batch_size == 1:
            return Fail(_no_smaller(self._config))
        half = self._batch_size // 2
        self.remember_micro_batch(half)
        what = f"step {step}: rank {self._ranks.rank} ran out of memory {where}"
        if "LUMINA_AGENT" in os.environ:  # which starts the ranks again by itself; a UserError would end the job
            return Fail(RestartError(f"{what}; the next start takes micro-batches of {half}"))
        remedy = f"Start the run again with --resume auto: it then takes micro-batches of {half}, same global batch."
        return Fail(UserError(what, remedy))

    def remember_micro_batch(self, batch_size: int) -> None:
        """Before it is taken; whichever rank is the one that knows."""
        self.record.keep_micro_batch(batch_size, self._memory)
        self.record.global_batch_size = self._global_batch
        self._write_record()

    def _write_record(self) -> None:
        if self._may_write():
            self.record.write(self._folder)

    def halved(self, action: HalveMicroBatch) -> None:
        """After it was carried out."""
        size, self._batch_size = self._batch_size, action.batch_size
        done = (
            f"micro-batch {size} -> {action.batch_size}, global batch {self._global_batch} as before; "
            "the step is taken again"
        )
        self._events.add(action.step, "recovery", "warn", "out-of-memory", action.failure, done, action.samples)
        log.warning("step %d: out of memory: micro-batch %d -> %d", action.step, size, action.batch_size)


def _no_smaller(config: Config) -> UserError:
    """What is left to do where a micro-batch cannot be smaller: of what makes activations fewer, what is not set yet
    and this model takes."""
    dense = config.experts is None and not config.compile
    ways = {one.flag: one.possible(config) and not one.saving(config) for one in MEMORY_SETTINGS}
    ways |= {
        f"--sequence-parallel {2 * config.sequence_parallel_size} on as many GPUs": dense
        and config.num_heads % (2 * config.sequence_parallel_size) == 0,
    }
    named = ", ".join(name for name, helps in ways.items() if helps)
    return UserError(
        "out of memory with a micro-batch of one sample",
        f"Where its activations are what fills the memory (docs/long-context.md): {named + ', ' if named else ''}or a "
        "smaller seq_length. Where weights and optimizer are: a DeepSpeed configuration that offloads "
        "(ds_configs/zero3_offload.json).",
    )
