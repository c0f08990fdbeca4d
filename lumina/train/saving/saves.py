"""Save policy: checkpoints by steps, for the best evaluation, on request and at the end, backups by steps or minutes,
retries with back-off, and the health line when a save fails.

Every rank must begin the same saves at the same steps. What only one rank knows (rank 0: a request, a retry, a backup
that is due by the clock; any rank: its writer is still busy) travels in the sum that every step makes anyway.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from lumina import checkpoint
from lumina.checkpoint import (
    Retention,
    RunLock,
    SaveJob,
    SaveKind,
    SaveOutcome,
    Saver,
    SaveReply,
    SaveRequests,
    SaveTarget,
    StagingBuffer,
)
from lumina.config import Config
from lumina.monitor import EventLog
from lumina.train.agreement import exchange
from lumina.train.deepspeed import Ranks
from lumina.train.deferred import Deferred
from lumina.train.health import Health
from lumina.train.state import RunState

log = logging.getLogger("lumina")

_BACK_OFF = 5.0  # seconds to the first retry; doubled each time
_RETRIES = 5
# Seconds for which a rank with an exception waits for the others. A failure that all ranks share reaches each of them
# within one step. A rank that fails alone would wait for ranks that sit in a collective, and delay the restart.
_MEETING = 10.0


class Saves:
    """Decides when to save, and follows each save to its end: one per rank, for one start of the run."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        folder: Path,
        state: RunState,
        deferred: Deferred,
        events: EventLog,
        health: Health,
        lock: RunLock | None,
        heartbeat: Callable[[str], None],
    ) -> None:
        """`folder`: the run's; `lock`: rank 0's claim on it, None on the others; `heartbeat`: of the watchdog."""
        self._config, self._ranks = config, ranks
        self._state, self._deferred, self._events, self._health = state, deferred, events, health
        self._heartbeat = heartbeat
        start = [secrets.token_hex(4)]
        dist.broadcast_object_list(start)
        self._may_write = may_write = lock.held if lock is not None else lambda: True
        self._saver = Saver(ranks.rank, ranks.world, start[0], 60 * config.save_timeout_minutes, may_write)
        self._checkpoints = SaveTarget("checkpoint", folder / "checkpoints", Retention(config.keep_last))
        self._backups: SaveTarget | None = None
        if config.backup_dir is not None:
            keep = Retention(config.backup_keep_last, config.backup_keep_every, config.backup_keep_best)
            self._backups = SaveTarget("backup", Path(config.backup_dir) / config.experiment_name, keep, verify=True)
        self._copies = StagingBuffer(state.engine.device)
        self._begun = state.step  # the step of the last checkpoint begun
        self._wanted: set[SaveKind] = set()
        self._busy_anywhere = False
        self._retry = _Retry()
        self._last_backup = time.monotonic()
        self._looked = 0.0
        self._inbox = SaveRequests(folder)
        self._requests: list[str] = []
        self._asked = False  # by code of this process
        self.stall = 0.0  # seconds that this step's saving took from the training
        self._written: list[Path] = []
        if lock is not None:
            for target in filter(None, (self._checkpoints, self._backups)):
                with suppress(OSError):
                    checkpoint.clear_leftovers(target.folder)

    # --- Agreement ---

    @property
    def flags(self) -> tuple[float, float, float]:
        """(this rank's writer is busy, a checkpoint is asked for, a backup is asked for), for the sum over ranks."""
        if not self._ranks.main:
            return float(self._saver.busy), float(self._asked), 0.0
        self._look_for_requests()
        minutes, backup = self._config.backup_every_minutes, False
        if minutes is not None and time.monotonic() - self._last_backup >= 60 * minutes:
            backup = True
        asked = self._asked or self._retry.due("checkpoint") or bool(self._requests)
        return float(self._saver.busy), float(asked), float(backup or self._retry.due("backup"))

    def agree(self, busy: float, checkpoint: float, backup: float) -> None:
        """Take in the sums of `flags` over all ranks."""
        self._busy_anywhere = busy > 0
        if checkpoint:
            self._wanted.add("checkpoint")
            self._asked = False
        if backup:
            self._wanted.add("backup")

    def request(self) -> None:
        """Have a checkpoint saved at one of the next steps, by every rank."""
        self._asked = True

    # --- At a step boundary; all of these are called on every rank alike ---

    @property
    def last_begun(self) -> int:
        """The step of the newest checkpoint that was begun, or that the run goes on from; 0 for none."""
        return self._begun

    def due(self) -> bool:
        """Whether something is to be saved at this step."""
        config, step = self._config, self._state.step
        if step % config.save_every_n_batches == 0:
            self._wanted.add("checkpoint")
        if config.backup_every_n_batches is not None and step % config.backup_every_n_batches == 0:
            self._wanted.add("backup")
        if self._begun == step:  # saved for the best evaluation, or resumed from just now
            self._wanted.discard("checkpoint")
        return bool(self._wanted)

    def at_step(self) -> None:
        """Begin what is due, unless a writer is still busy: then at a later step."""
        self.collect()
        if self.due() and not self._busy_anywhere:
            self._begin(self._wanted)

    def before_update(self) -> None:
        """The next update may not overtake the copies of a snapshot: on a GPU its stream waits for them."""
        self._copies.before_update()

    def best(self) -> None:
        """Save this step as the best so far. Waits for a save under way, since a later step would not be it."""
        if self._settled():
            self._begin({"checkpoint", *self._wanted}, best_loss=self._state.trainer_state.best_loss)
        else:
            self._failed("save-failed", "the checkpoint of the best evaluation: the save before it still runs")

    def finish(self) -> bool:
        """Have a checkpoint of this step named, with a backup where one is due, and nothing under way; returns whether
        the checkpoint is. Tries again a few times where that can help."""
        self.due()
        tried = False
        for wait in (0.0, 1.0, 4.0, None):
            settled = self._settled()
            self.collect()
            state = [self._named(), self._retry.hopeful.get("checkpoint", True)]
            dist.broadcast_object_list(state)
            named, hopeful = state
            if named or not settled or wait is None or (tried and not hopeful):
                break
            if tried:
                time.sleep(wait)
            self._begin({"checkpoint", *self._wanted})
            tried = True
        for request in self._requests:
            path = self._checkpoints.folder / checkpoint.name_of(self._state.step)
            error = "" if named else "the run ended and could not save"
            self._inbox.reply(request, SaveReply(step=self._state.step, path=str(path), error=error))
        return bool(named)

    def _named(self) -> bool:
        """Whether the checkpoint of this step was written by this start and is there."""
        step = self._state.step
        there = (self._checkpoints.folder / checkpoint.name_of(step)).is_dir()
        return there and self._begun == step and not self._retry.pending("checkpoint")

    def _settled(self) -> bool:
        """Wait until no rank writes, as long as a save may take; whether none does, agreed."""
        self._wait()
        return not self._busy_anywhere

    def _wait(self) -> float:
        """Wait as `_settled`; the seconds it took."""
        began = time.perf_counter()
        deadline = time.monotonic() + 66 * self._config.save_timeout_minutes
        while not (free := self._saver.wait(1.0)) and time.monotonic() < deadline:
            self._heartbeat("waiting for a save")
        agreement = torch.tensor(float(free), device=self._state.engine.device)
        dist.all_reduce(agreement, op=dist.ReduceOp.MIN)
        self._busy_anywhere = not bool(agreement.item())
        took = time.perf_counter() - began
        self.stall += took
        return took

    def _begin(self, kinds: set[SaveKind], best_loss: float | None = None) -> None:
        began = time.perf_counter()
        wanted, self._wanted = set(kinds), set()
        targets = [t for t in (self._checkpoints, self._backups) if t is not None and t.kind in wanted]
        if not targets:
            return
        assert not self._deferred.pending, "the step's numbers belong to its checkpoint"
        snapshot = self._state.snapshot(self._copies)
        requests, self._requests = self._requests, []
        job = SaveJob(snapshot, targets, best_loss, requests)
        self._saver.begin(job)
        if "checkpoint" in wanted:
            self._begun = self._state.step
        if "backup" in wanted:
            self._last_backup = time.monotonic()
        for target in targets:
            self._retry.begun(target.kind)
        self._busy_anywhere = True
        job.stall = time.perf_counter() - began
        self.stall += job.stall
        if not self._config.save_async:
            job.stall += self._wait()
            self.collect()

    # --- What came of it; rank 0 has the word ---

    def collect(self) -> None:
        """Report what was finished since the last time."""
        for outcome in self._saver.outcomes():
            if self._ranks.main:
                self._report(outcome)

    def _report(self, outcome: SaveOutcome) -> None:
        step = outcome.job.snapshot.step
        rule = "save-failed" if outcome.kind == "checkpoint" else "backup-failed"
        if outcome.path is not None:
            self._retry.succeeded(outcome.kind)
            self._health.clear(rule)
            self._events.add(
                step,
                "save",
                "info",
                outcome.kind,
                f"step {step} written",
                str(outcome.path),
                seconds=round(outcome.seconds, 3),
                bytes=outcome.job.snapshot.bytes,
                stall=round(outcome.job.stall, 4),
            )
            if outcome.kind == "checkpoint":
                self._written.append(outcome.path)
        else:
            wait = self._retry.failed(outcome.kind, outcome.retry)
            then = f"tried again in {wait:.0f} s" if wait is not None else "not tried again before the next is due"
            self._failed(rule, f"{outcome.kind} of step {step}: {outcome.error}", then)
        if outcome.kind == "checkpoint":
            for request in outcome.job.requests:
                reply = SaveReply(step=step, path=str(outcome.path or ""), error=outcome.error)
                self._inbox.reply(request, reply)

    def written(self) -> list[Path]:
        """The checkpoints that got their names since the last call; on rank 0, which alone knows."""
        found, self._written = self._written, []
        return found

    def _failed(self, rule: str, reason: str, action: str = "") -> None:
        self._events.add(self._state.step, "save", "warn", rule, reason, action)
        self._health.report(rule, "warn", f"{rule}: {reason}", lasting=True)

    # --- Requests ---

    def _look_for_requests(self) -> None:
        """Once a second: has somebody asked for a checkpoint?"""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return
        self._looked = now
        if self._may_write():  # else they are for the start that owns the run now
            self._requests += self._inbox.take()

    # --- Going back ---

    def drain(self) -> bool:
        """Nothing is being written any more, on any rank, and what came of it is reported."""
        settled = self._settled()
        self.collect()
        return settled

    def rewound(self) -> None:
        """The run went back to an earlier checkpoint: nothing of the steps after it is wanted any more."""
        self._begun = self._state.step
        self._wanted.clear()

    # --- After an exception ---

    def emergency(self, why: str, alone: bool, rewinding: bool) -> None:
        """Save this step before an exception ends the run, if every rank says in time that it stands at the same step
        with a consistent state, and the step is not saved already. Never collective: a rank may be gone. `alone`: one
        is gone, so there is nobody to agree with; `rewinding`: the run was about to give this state up."""
        step = self._state.step
        if not self._config.emergency_checkpoint:
            return
        try:
            refusal = "another rank is gone" if alone else self._emergency(why, rewinding)
        except Exception as error:  # what ended the run is what the user must hear of
            refusal = f"{type(error).__name__}: {error}"
        action = "" if refusal else f"emergency checkpoint of step {step}"
        self._events.add(step, "recovery", "crit", "exception", why, action or f"no emergency checkpoint: {refusal}")
        if self._ranks.main:
            log.error("step %d: %s; %s", step, why, action or f"no emergency checkpoint: {refusal}")

    def _emergency(self, why: str, rewinding: bool) -> str:
        """Why there is none; empty when it was saved."""
        state, ranks, seconds = self._state, self._ranks, self._config.emergency_seconds
        free = self._saver.wait(seconds)
        self.collect()
        refusal = "" if state.consistent else "an update was half made"
        refusal = refusal or ("the run was about to go back" if rewinding else "")
        if not refusal and not free:
            refusal = "a save before it is still being written"
        snapshot = None
        if not refusal:
            snapshot = state.snapshot(self._copies)
            snapshot.trainer["emergency"] = why
            if not snapshot.finite():
                refusal = "the weights are not finite"
        saved = (self._checkpoints.folder / checkpoint.name_of(state.step)).is_dir() or state.step == 0
        own = {"step": state.step, "refusal": refusal, "saved": ranks.main and saved}
        states = exchange("lumina/emergency", own, ranks, min(seconds, _MEETING))
        if states is None or any(one["step"] != state.step for one in states):
            return "the ranks do not stand at the same step"
        refusals = [one["refusal"] for one in states if one["refusal"]] + (
            ["the step is saved already"] if states[0]["saved"] else []
        )
        if refusals or snapshot is None:
            return str(refusals[0])
        self._saver.begin(SaveJob(snapshot, [self._checkpoints]))
        if not self._saver.wait(seconds):
            return "the disk is too slow"
        error = next((outcome.error for outcome in self._saver.outcomes()), "")
        # Rank 0 needs the others' processes no more once it has named the checkpoint; until then they stay.
        exchange("lumina/emergency-written", {}, ranks, seconds)
        return error

    def stop_waiting(self, seconds: float) -> bool:
        """At the very end, or after an exception: give the writer `seconds` more, and tell whoever still waits for a
        checkpoint. Not collective."""
        free = self._saver.wait(seconds)
        self._tell_askers()
        return free

    def _tell_askers(self) -> None:
        """The run has ended, or has a checkpoint of its last step, or another start owns it."""
        if not self._ranks.main:
            return
        with suppress(Exception):  # what ended the run is what the user must hear of
            self.collect()
        step, lost = self._state.step, not self._may_write()
        path = self._checkpoints.folder / checkpoint.name_of(step)
        error = "" if path.is_dir() else f"the run ended at step {step} before it was saved"
        error = "another start of the run took it over meanwhile: ask again" if lost else error
        self._inbox.close(SaveReply(step=step, path=str(path), error=error), lost)


class _Retry:
    """Kinds of save to retry, and when: the back-off is doubled and bounded, with no retry where it cannot help."""

    def __init__(self) -> None:
        self._at: dict[str, float | None] = {}
        self._count: dict[str, int] = {}
        self.hopeful: dict[str, bool] = {}  # whether another try can help

    def failed(self, kind: str, retry: bool) -> float | None:
        """Seconds until the next try; None for no further try before the next save is due anyway."""
        self._count[kind] = self._count.get(kind, 0) + 1
        self.hopeful[kind] = retry
        wait = _BACK_OFF * 2 ** (self._count[kind] - 1)
        hopeless = not retry or self._count[kind] > _RETRIES
        self._at[kind] = None if hopeless else time.monotonic() + wait
        return None if hopeless else wait

    def succeeded(self, kind: str) -> None:
        self._at.pop(kind, None)
        self._count.pop(kind, None)
        self.hopeful[kind] = True

    def begun(self, kind: str) -> None:
        if kind in self._at:
            self._at[kind] = None  # under way: its outcome decides

    def due(self, kind: str) -> bool:
        at = self._at.get(kind)
        return at is not None and time.monotonic() >= at

    def pending(self, kind: str) -> bool:
        """Whether the last try failed."""
        return kind in self._at
