"""What a run does about trouble by itself: going back after repeated spikes, and smaller micro-batches after running
out of memory. Each answer is bounded, alike on every rank, and in the event log. docs/health.md lists them.

What must outlive the process (the steps that are gone past, how often the run went back, the micro-batch) is kept in
`answers.json` in the run's folder, written before it is acted upon: a run that is killed in the middle of an answer
comes to the same end (law 6).
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lumina import checkpoint
from lumina.config import UserError
from lumina.files import write_json
from lumina.train import snapshot
from lumina.train.recovery.spikes import GRAD_EXPLOSION, LOSS_SPIKE, NOT_FINITE, Guard
from lumina.train.torch_private import default_store

if TYPE_CHECKING:
    from lumina.data import StepData
    from lumina.train.run import Run

log = logging.getLogger("lumina")

FILE = "answers.json"
Verdict = tuple[str, str]  # the guard's rule and its reason
_MANY = 64  # ranks
_NEVER = -1.0  # a limit that no gradient norm keeps


class Rewind(Exception):  # noqa: N818 (a change of course, no error)
    """The state was set back or rebuilt on every rank: iterate anew from the run's progress."""


class StartAgainError(RuntimeError):
    """This start cannot go on, and the next one will do better. Not saved first: the ranks do not stand together."""


@dataclass
class Memory:
    """answers.json. past: steps (from 1) whose samples are gone past; rollbacks: how often the run went back;
    batch_size: the micro-batch after running out of memory, None for the configured one."""

    past: list[int] = field(default_factory=list)
    rollbacks: int = 0
    batch_size: int | None = None
    global_batch_size: int | None = None  # of the run, when batch_size is set

    @classmethod
    def read(cls, folder: Path) -> Memory:
        try:
            return cls(**json.loads((folder / FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()


class Answers:
    """One per rank, for one start of the run."""

    def __init__(self, run: Run, memory: Memory) -> None:
        self._run = run
        self.memory = memory
        self.corrupt = 0
        self._repeated: list[int] = []  # the refused steps that the run is to go back for

    def _keep(self, any_rank: bool = False) -> None:
        if self._run.ranks.main or any_rank:
            try:
                write_json(self._run.folder / FILE, asdict(self.memory))
            except OSError as error:
                log.warning("%s could not be written: %s", FILE, error)

    def passes(self, step: int) -> bool:
        """Whether step `step` (from 1) was the trouble that the run went back for: no update is made for it."""
        return step in self.memory.past

    def pass_by(self, data: StepData) -> None:
        """Count the step as done without training on it."""
        run = self._run
        run.progress.step = data.step + 1
        run.events.add(
            data.step + 1, "recovery", "info", "rollback", "its samples brought the run back", "gone past", data.samples
        )

    # --- Skipped steps, and going back ---

    def limit(self, loss: Tensor) -> Tensor:
        """The gradient norm above which a step of this loss is not applied: any norm, when the loss itself is bad.
        Both float64, 0-dimensional, on the device."""
        most, norm = math.inf, math.inf
        if self._run.config.on_spike != "warn":
            most, norm = self._run.guard.loss_limit(), self._run.guard.norm_limit()
        bad = ~(torch.isfinite(loss) & (loss <= most))
        return torch.full_like(loss, norm).masked_fill_(bad, _NEVER)

    def judge(self, loss: float, norm: float) -> Verdict | None:
        """What is wrong with a step, if anything; asked before it enters the baselines."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return NOT_FINITE, f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if (reason := self._run.guard.judge_loss(loss)) is not None:
            return LOSS_SPIKE, reason
        reason = self._run.guard.judge_norm(norm)
        return None if reason is None else (GRAD_EXPLOSION, reason)

    def after_update(self, data: StepData, loss: float, norm: float, applied: bool, verdict: Verdict | None) -> None:
        """Take note of a step. A refused one goes to the event log with its samples; after repeated ones
        `go_back_if_due` brings the run back."""
        run, step = self._run, data.step + 1
        if applied:
            run.guard.accept(loss, norm)
        if verdict is None and applied:
            return
        rule, reason = verdict or (NOT_FINITE, f"loss {loss:.4g}, gradient norm {norm:.4g}")
        action = "reported only" if applied else "update skipped on all ranks"
        run.events.add(step, "recovery", "warn", rule, reason, action, data.samples, loss=loss, grad_norm=norm)
        # fp16 looks for its loss scale by gradients that are not finite; a loss that is not has another cause.
        if applied or (run.engine.fp16 and rule == NOT_FINITE and math.isfinite(loss)):
            return
        refused = run.guard.refuse(step)
        if run.config.rollback_after and len(refused) >= run.config.rollback_after:
            self._repeated = refused

    @property
    def going_back(self) -> bool:
        """Whether the run is about to go back: the state that it stands at is given up."""
        return bool(self._repeated)

    def go_back_if_due(self) -> None:
        """Go back after repeated refused steps; then this raises Rewind, on every rank."""
        refused, self._repeated = self._repeated, []
        if refused:
            self._go_back(refused)

    def _go_back(self, refused: list[int]) -> None:
        run, config = self._run, self._run.config
        many = f"{len(refused)} updates were skipped within {config.health_check_interval} steps"
        if self.memory.rollbacks >= config.max_rollbacks:
            if config.max_rollbacks == 0:
                return
            run.events.add(run.progress.step, "recovery", "crit", "rollback", many, "the run ends: no rollback is left")
            raise UserError(
                f"step {run.progress.step}: {many}, after {self.memory.rollbacks} rollbacks",
                "Lower learning_rate or look at the samples in events.jsonl; max_rollbacks allows more tries.",
            )
        run.saves.drain()
        target = self._target(refused[0])
        if target is None:
            run.events.add(
                run.progress.step, "recovery", "warn", "rollback", many, "no earlier checkpoint: the run goes on"
            )
            run.guard.forgive()
            return
        at = run.progress.step
        self.memory.rollbacks += 1
        self.memory.past = sorted({*self.memory.past, *refused})
        self._keep()
        progress, trainer = checkpoint.read_trainer_state(target)
        run.engine.discard()  # the step after them has been begun
        snapshot.load_checkpoint(target, run.engine, trainer)
        progress.world, progress.precision = run.progress.world, run.progress.precision
        progress.zero_stage = run.progress.zero_stage
        run.progress, run.guard = progress, Guard(config, progress.guard)
        if run.ranks.main:
            self._forget_after(target, progress)
            run.rewind_records()
        run.saves.rewound()
        run.events.add(
            at,
            "recovery",
            "crit",
            "rollback",
            many,
            f"back to the checkpoint of step {progress.step}; steps {', '.join(map(str, refused))} are gone past",
            to=progress.step,
            past=refused,
            rollbacks=self.memory.rollbacks,
        )
        dist.barrier()
        raise Rewind

    def _target(self, first: int) -> Path | None:
        """The newest valid checkpoint from before step `first` was tried, chosen by rank 0."""
        found: list[Any] = [None]
        if self._run.ranks.main:
            saved = checkpoint.list_checkpoints(self._run.checkpoints)
            found = [checkpoint.latest_valid([path for path in saved if checkpoint.step_of(path) < first])]
        dist.broadcast_object_list(found)
        target: Path | None = found[0]
        return target

    def _forget_after(self, target: Path, progress: checkpoint.TrainerState) -> None:
        """Checkpoints made amid the trouble would be resumed from: they lose their names."""
        folder = target.parent
        for path in checkpoint.list_checkpoints(folder):
            if checkpoint.step_of(path) > progress.step:
                checkpoint.discard(path)
        best = progress.best_step
        if best is not None and progress.best_loss is not None and (folder / checkpoint.name_of(best)).is_dir():
            checkpoint.record_best(folder, best, progress.best_loss)
        else:
            (folder / checkpoint.BEST).unlink(missing_ok=True)

    # --- Samples that cannot be read ---

    def note_corrupt(self, data: StepData) -> None:
        """Some rank replaced samples of this step by ones of weight zero; collective."""
        found: list[Any] = [None] * self._run.ranks.world
        dist.all_gather_object(found, data.corrupt)
        samples = sorted({sample for part in found for sample in part})
        self.corrupt += len(samples)
        reason = f"{len(samples)} sample(s) of step {data.step + 1} cannot be read ({self.corrupt} so far)"
        action = "replaced by samples of weight zero"
        self._run.events.add(
            data.step + 1, "recovery", "warn", "corrupt-sample", reason, action, samples, count=self.corrupt
        )
        self._run.health.report("corrupt-sample", "warn", reason)

    # --- Out of memory ---

    def all_ran_out(self, step: int, clean: bool) -> bool:
        """After this rank ran out of memory in the micro-batches of `step` (from 1): wait, at most emergency_seconds,
        until every rank has told how it came through. Returns whether all ran out with no collective begun: only then
        can they answer together. One that came through has reduced its gradients with the others, or waits for them.
        `clean`: this rank has begun no collective."""
        group = self._run.ranks
        if group.world == 1:
            return True
        if not self._talks:
            return False
        self.tell(step, "clean" if clean else "dirty")
        states = [self._told(rank, step) for rank in range(group.world)]
        return all(state == "clean" for state in states)

    @property
    def _talks(self) -> bool:
        """Whether ranks tell each other of every step. Not under ZeRO-3, whose forward pass is full of collectives, nor
        among many, for whom that is a store operation of every rank at every step: there memory that runs out ends the
        start, and the next one takes half."""
        run = self._run
        return run.config.on_oom != "fail" and 1 < run.ranks.world <= _MANY and run.engine.stage < 3

    def tell(self, step: int, state: str) -> None:
        """Let the other ranks know, without a collective, how this rank came through the micro-batches of a step."""
        if self._talks:
            with suppress(RuntimeError):  # the store is gone with rank 0: the next collective says so
                default_store().set(f"lumina/step/{self._run.ranks.rank}", f"{step}:{state}")

    def _told(self, rank: int, step: int) -> str:
        """What `rank` told of `step`; "silent" when it says nothing in time, because it sits in a collective; "gone"
        when rank 0, which holds the store, has given up before this rank could ask."""
        key, deadline = f"lumina/step/{rank}", time.monotonic() + self._run.config.emergency_seconds
        while time.monotonic() < deadline:
            try:
                told = default_store().get(key).decode() if default_store().check([key]) else None
            except RuntimeError:
                return "gone"
            if told is not None:
                at, state = told.split(":")
                if int(at) == step:
                    return str(state)
            time.sleep(0.02)
        return "silent"

    def update_ran_out(self, step: int, samples: Any, failure: str) -> NoReturn:
        """After this rank ran out of memory inside the update of `step` (from 1). Where every rank did, at the same
        place and before anything was changed, the micro-batch is halved; otherwise some ranks have made the update, or
        wait for this one in a collective: the next start goes on from the last checkpoint, with half of it."""
        run = self._run
        states = self._where_all_stopped(step, "begun" if run.engine.begun else f"clean {run.engine.timer.collectives}")
        if len(set(states)) == 1 and states[0].startswith("clean"):
            run.sound = True
            self.shrink(step, samples, failure)
            raise Rewind
        self.give_up_memory(step, "inside the update")

    def _where_all_stopped(self, step: int, state: str) -> list[str]:
        """Every rank's state, in a key of this try of the step alone; "silent" of one that does not say in time."""
        run = self._run
        if run.ranks.world == 1:
            return [state]
        key, seconds = f"lumina/update/{step}/{run.config.batch_size}", run.config.emergency_seconds
        found = agreed(key, {"state": state}, run.ranks.rank, run.ranks.world, seconds)
        return ["silent"] if found is None else [str(one["state"]) for one in found]

    def give_up_memory(self, step: int, where: str = "in the middle of a collective") -> NoReturn:
        """The ranks cannot agree within the step: the next start takes half the micro-batch."""
        half = self._half()
        self._remember(half)
        what = f"step {step}: rank {self._run.ranks.rank} ran out of memory {where}"
        if "LUMINA_AGENT" in os.environ:  # which starts the ranks again by itself; a UserError would end the job
            raise StartAgainError(f"{what}; the next start takes micro-batches of {half}")
        raise UserError(
            what, f"Start the run again with --resume auto: it then takes micro-batches of {half}, same global batch."
        )

    def _remember(self, batch_size: int) -> None:
        self.memory.batch_size, self.memory.global_batch_size = batch_size, self._run.global_batch
        self._keep(any_rank=True)

    def _half(self) -> int:
        size = self._run.config.batch_size
        if size == 1:
            raise UserError(
                "out of memory with a micro-batch of one sample",
                "Set gradient_checkpointing, a smaller seq_length, or a DeepSpeed configuration that offloads "
                "(ds_configs/zero3_offload.json).",
            )
        return size // 2

    def shrink(self, step: int, samples: Any, failure: str) -> None:
        """Rebuild the engine for half the micro-batch and twice the accumulation; collective. The global batch, its
        order and its loss stay as they are (laws 1 and 2). The caller iterates anew."""
        run = self._run
        size, half = run.config.batch_size, self._half()
        run.saves.drain()
        self._remember(half)
        run.rebuild(half)
        run.events.add(
            step,
            "recovery",
            "warn",
            "out-of-memory",
            failure,
            f"micro-batch {size} -> {half}, global batch {run.global_batch} as before; the step is taken again",
            samples,
        )
        log.warning("step %d: out of memory: micro-batch %d -> %d", step, size, half)


def agreed(key: str, value: dict[str, Any], rank: int, world: int, seconds: float) -> list[dict[str, Any]] | None:
    """Every rank's `value` under `key`, without a collective; None when some rank says nothing for `seconds`."""
    if world == 1:
        return [value]
    try:
        group = default_store()
        group.set(f"{key}/{rank}", json.dumps(value))
        keys = [f"{key}/{other}" for other in range(world)]
        group.wait(keys, timedelta(seconds=seconds))
        return [json.loads(group.get(name)) for name in keys]
    except Exception as error:  # a rank that is gone, or the store with it
        log.warning("the ranks could not agree: %s", error)
        return None
