"""Builds a run from its configuration: a recipe from top to bottom, which returns the parts."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lumina import checkpoint
from lumina.checkpoint import RunLock
from lumina.cluster import RankNode, StopRequest, own_node, shared_rows
from lumina.config import Config, UserError
from lumina.files import write_text
from lumina.model import lora, report_kernel
from lumina.monitor import Console, EventLog
from lumina.train.agreement import (
    agree_on_contents,
    agree_on_data,
    agree_on_launch,
    assert_lock_held,
    decided_by_rank_0,
    gathered,
    manifest_digest,
    together,
)
from lumina.train.callbacks import Callback, Callbacks
from lumina.train.deepspeed import Engine, LayerStats, Ranks
from lumina.train.deferred import Deferred
from lumina.train.health import Health, MachineWatch
from lumina.train.initialise import (
    Start,
    TrainingData,
    base_of_adapters,
    check_resumed,
    find_start,
    keep_tokenizer,
    load_initial_weights,
    load_resumed,
    open_data,
)
from lumina.train.liveness.stragglers import Stragglers
from lumina.train.liveness.watchdog import Watchdog
from lumina.train.liveness.watching import beat_between_passes, watched_evaluation
from lumina.train.make_engine import Settings, make_engine, resolve
from lumina.train.objectives import Preparation, objective
from lumina.train.outputs.outputs import Outputs, RunOutputs
from lumina.train.recovery.record import RecoveryRecord
from lumina.train.recovery.recovery import Recovery
from lumina.train.recovery.spikes import SpikeDetector
from lumina.train.saving.places import check_backups, refuse_unwritable
from lumina.train.saving.saves import Saves
from lumina.train.schedules import Schedule, schedule
from lumina.train.state import RunState

log = logging.getLogger("lumina")


@dataclass
class Run:
    """The parts of a run on one rank. The loop works on all of them; each part has been given what it uses, and no part
    has the run. `settings`, the state's engine and `layers` are replaced when the engine is rebuilt."""

    ranks: Ranks
    settings: Settings
    data: TrainingData
    schedule: Schedule
    state: RunState
    deferred: Deferred
    saves: Saves
    recovery: Recovery
    outputs: Outputs
    stragglers: Stragglers
    callbacks: Callbacks
    watchdog: Watchdog
    stop: StopRequest
    lock: RunLock | None = None  # rank 0's claim on the run's folder
    layers: LayerStats | None = None

    @property
    def config(self) -> Config:
        return self.settings.config

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / self.config.experiment_name

    @property
    def usual_world(self) -> int:  # at least; some may be lost at the moment
        return max(self.ranks.world, self.settings.sequence_parallel_size)


@dataclass(frozen=True)
class _Prepared:
    """What a start has found out before it claims the run's folder. origin: what it goes on from, and what is changed,
    for people; nodes: of each rank."""

    start: Start
    settings: Settings
    data: TrainingData
    rates: Schedule
    origin: list[str]
    folder: Path
    job: str | None  # the launch that this start belongs to
    nodes: list[RankNode]


def build(config: Config, ranks: Ranks, callbacks: Sequence[Callback] = ()) -> Run:
    """A run that is ready for its first step: its data prepared, its state initialised or resumed, its folder claimed.
    In the process group that `ranks` describes; every rank builds at the same time. Raises UserError."""
    stop = StopRequest()
    stop.interruptible = ranks.world == 1 and "LUMINA_JOB" not in os.environ  # until the first step
    watchdog = Watchdog(config.hang_timeout, config.stop_timeout, stop, ranks.rank)
    with ExitStack() as undo:
        # The run's own console is not there yet, and speaks only after this one has ended: in a terminal its end wipes
        # the view, which would be lines of the run's own below it.
        with Console(ranks.main, 0, 0, config.experiment_name, config.live_view, before=True) as console:
            with stop.at_once():
                prepared = _prepare(config, ranks, stop, console)
            ranks = replace(ranks, sequence=prepared.settings.config.sequence_parallel_size)
            lock, may_write = _claim(prepared, ranks)
            if lock is not None:
                undo.callback(lock.release)
            state = _initialise(prepared, ranks, may_write, watchdog, console.progress)
        run = _assemble(prepared, state, ranks, lock, may_write, callbacks, stop, watchdog)
        undo.pop_all()
    return run


def _prepare(config: Config, ranks: Ranks, stop: StopRequest, console: Console) -> _Prepared:
    """Settings, data and what to go on from; collective. Nothing is written to the run's folder."""
    folder = Path(config.output_dir) / config.experiment_name
    job = agree_on_launch(ranks, folder)
    decided_by_rank_0(ranks, lambda: checkpoint.refuse_owned(folder, job))
    start = find_start(config, folder, ranks, job)
    stop.saved = start.checkpoint is not None and start.checkpoint.parent.parent.resolve() == folder.resolve()
    ranks = replace(ranks, sequence=start.config.sequence_parallel_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = together(
        ranks,
        "resolving the settings",
        lambda: resolve(start, ranks.world, device),
    )
    config = settings.config
    backups = decided_by_rank_0(ranks, lambda: check_backups(config))
    _say(ranks, "preparing the data")
    # Bytes of input, as `Preparing 12/341 MB`. Without a live view the log tells.
    preparing = partial(console.progress, "Preparing", unit=" MB", size=10**6)
    data = open_data(start, config, ranks, preparing if console.live else None)
    rates = schedule(config, data.total_steps)
    settings = replace(settings, base=base_of_adapters(config, ranks, start.checkpoint, start.trainer_state))
    agree_on_data(ranks, _facts(start, settings, data, device))
    agree_on_contents(ranks, [one for one in (data.train, data.evaluation) if one is not None])
    origin = [start.origin(settings.base), *check_resumed(start, config, data, ranks), *backups]
    nodes = gathered(ranks, "opening the data", own_node(), list)
    return _Prepared(start, settings, data, rates, origin, folder, job, nodes)


def _claim(prepared: _Prepared, ranks: Ranks) -> tuple[RunLock | None, Callable[[], bool]]:
    """Take the run's lock, for rank 0, unless a start took it that lives, while this one prepared; and whether this
    start still has it, for every rank; collective."""
    taken: list[RunLock] = []

    def claim() -> str:
        size = prepared.settings.config.global_batch_size
        assert size is not None  # filled in by `resolve`
        checkpoint.refuse_owned(prepared.folder, prepared.job)
        lock = RunLock(prepared.folder, prepared.job, size)
        taken.append(lock)
        try:
            refuse_unwritable(prepared.folder / "checkpoints")
            if prepared.start.config.resume is None:
                RecoveryRecord.remove(prepared.folder)
            else:
                prepared.start.recovery.take_over(prepared.folder)
        except (OSError, UserError):
            lock.release()
            raise
        return lock.token

    token = decided_by_rank_0(ranks, claim)
    return taken[0] if taken else None, partial(checkpoint.owned_by, prepared.folder, token)


def _assemble(
    prepared: _Prepared,
    state: RunState,
    ranks: Ranks,
    lock: RunLock | None,
    may_write: Callable[[], bool],
    callbacks: Sequence[Callback],
    stop: StopRequest,
    watchdog: Watchdog,
) -> Run:
    """The parts of a run whose folder is claimed and whose state is there."""
    start, settings, data, folder = prepared.start, prepared.settings, prepared.data, prepared.folder
    config = settings.config
    assert_lock_held(ranks, lock)  # two starts at one moment: the first of them writes nothing beside the other's files
    events = EventLog(folder / "events.jsonl" if ranks.main else None, may_write)
    health = Health(config, events)
    # Rank 0's alone, and the others' next step would wait for it.
    opening = partial(_open_outputs, prepared, ranks, state, events, health, may_write)
    outputs = together(ranks, "opening the run's outputs", opening)
    deferred = Deferred()
    saves = Saves(config, ranks, folder, state, deferred, events, health, lock, watchdog.heartbeat)
    recovery = Recovery(config, ranks, folder, start.recovery, state, events, health, may_write, settings.memory)
    return Run(
        ranks=ranks,
        settings=settings,
        data=data,
        schedule=prepared.rates,
        state=state,
        deferred=deferred,
        saves=saves,
        recovery=recovery,
        outputs=outputs,
        stragglers=Stragglers(ranks, config.straggler_interval, config.straggler_factor),
        callbacks=Callbacks(
            callbacks, ranks, folder, data.total_steps, state, data.order, outputs, saves.request, watchdog.heartbeat
        ),
        watchdog=watchdog,
        stop=stop,
        lock=lock,
    )


def _facts(start: Start, settings: Settings, data: TrainingData, device: str) -> dict[str, Any]:
    """What only the data and the machine say, and every rank must find the same."""
    facts = {"data": data.train, "evaluation data": data.evaluation}
    found: dict[str, Any] = {
        name: None if one is None else f"{one.num_samples} samples, {one.fingerprint[:16]}"
        for name, one in facts.items()
    }
    weights = {"checkpoint": start.checkpoint, "initial weights": start.weights, "base of the adapters": settings.base}
    found |= {f"{name} {path}": manifest_digest(path) for name, path in weights.items() if path is not None}
    resolved = {f"{name} in DeepSpeed's configuration": value for name, value in settings.ds_config.items()}
    return {**found, "tokenizer": data.tokenizer.fingerprint, "device": device, **resolved}


def _say(ranks: Ranks, text: str) -> None:
    """What is being done, on rank 0, before the run has its outputs."""
    if ranks.main:
        log.info("%s", text)


def _initial_weights(
    settings: Settings, ranks: Ranks, engine: Engine, start: Start, progress: Callable[[str, int, int], None]
) -> None:
    """Another run's weights, unless they are there already, under adapters."""
    config = settings.config
    if settings.base is None and config.init_from is not None:
        load_initial_weights(config.init_from, start.weights, config, ranks, engine, partial(progress, "Loading"))
    elif settings.base is None and start.checkpoint is not None:  # a reference model that has to be made again
        raise UserError(
            f"nothing says what the run of {start.checkpoint} began with, whose weights are needed again",
            "Add --init-from RUN, with the run that it began with.",
        )


def _initialise(
    prepared: _Prepared,
    ranks: Ranks,
    may_write: Callable[[], bool],
    watchdog: Watchdog,
    progress: Callable[[str, int, int], None],
) -> RunState:
    """An engine with the checkpoint's weights and optimizer state, or initial ones, and what a checkpoint will say of
    this start."""
    start, settings, data, folder = prepared.start, prepared.settings, prepared.data, prepared.folder
    config, trainer_state, resumed = settings.config, start.trainer_state, start.checkpoint is not None
    torch.manual_seed(config.seed)
    loading = f", loading {start.checkpoint}" if resumed else ""
    _say(ranks, f"building the model of {config.num_parameters() / 1e6:.1f}M parameters{loading}")
    loading_base = partial(together, ranks, "loading the weights under the adapters")
    engine = make_engine(settings, not resumed and config.init_from is None, loading_base)
    objective(config).prepare(
        Preparation(
            train_data=data.train,
            eval_data=data.evaluation,
            folder=folder,
            may_write=may_write,
            rank=ranks.rank,
            world=ranks.world,
            data_rank=ranks.data_rank,
            data_world=ranks.data_world,
            part=ranks.part,
            micro_batch_size=config.batch_size,
            resumed=resumed,
            initialise=partial(_initial_weights, settings, ranks, engine, start, progress),
            forward=engine.forward,
            evaluation=partial(watched_evaluation, watchdog, engine),
            device=engine.device,
            heartbeat=partial(beat_between_passes, watchdog, engine),
            progress=progress,
            by_rank_0=partial(decided_by_rank_0, ranks),
        )
    )
    if resumed:
        load_resumed(start, ranks, engine, partial(progress, "Loading"))
    else:
        _initial_weights(settings, ranks, engine, start, progress)
    assert config.global_batch_size is not None
    trainer_state.global_batch_size, trainer_state.world = config.global_batch_size, ranks.world
    trainer_state.precision, trainer_state.zero_stage = settings.precision, engine.stage
    trainer_state.chat_template = config.chat_template or ""
    trainer_state.rotary_angles = checkpoint.rotary_angles(config)
    trainer_state.lora = checkpoint.adapter_settings(config)
    trainer_state.base = {} if settings.base is None else checkpoint.base_reference(settings.base, folder)
    trainer_state.model, trainer_state.data_fingerprint = checkpoint.model_shape(config), data.train.fingerprint
    return RunState(engine, trainer_state, SpikeDetector(config, trainer_state.guard))


def _placement(ranks: Ranks, settings: Settings, nodes: Sequence[RankNode]) -> list[str]:
    """Where the ranks are that share rows, and what they exchange (lumina.model.parallel.sequence), for people; none
    where each has its own."""
    size, config = ranks.sequence, settings.config
    if size == 1:
        return []
    heads = 2 * config.num_heads + 2 * math.lcm(config.num_kv_heads, size)
    sent = heads * config.head_dim * (size - 1) // size * (4 if settings.precision == "fp32" else 2)
    where, remedy = shared_rows(size, nodes)
    return [
        f"sequence parallelism: {size} neighbouring ranks share each micro-batch's tokens, {where}",
        *([f"WARNING: {remedy}"] if remedy else []),
        f"attention's exchanges: {sent:,} bytes sent a token and layer forward, as many backward; `exchange` in a "
        "step's times",
    ]


def _open_outputs(
    prepared: _Prepared,
    ranks: Ranks,
    state: RunState,
    events: EventLog,
    health: Health,
    may_write: Callable[[], bool],
) -> Outputs:
    """The run's folder with its resolved configuration, log and metrics, on rank 0. `may_write`: false once another
    start owns the folder."""
    settings, folder, data, nodes = prepared.settings, prepared.folder, prepared.data, prepared.nodes
    config, engine = settings.config, state.engine
    # On every rank: chosen here, not in its first step.
    kernel = report_kernel(engine.device, settings.precision, config.attention_softcap)
    if not ranks.main:
        return Outputs()
    for name in ("checkpoints", "backups"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # run.json has what this start trains with
    write_text(folder / "config.yaml", keep_tokenizer(settings.kept, folder).to_yaml("init_from"))
    disks = [folder / "checkpoints"] + ([Path(config.backup_dir)] if config.backup_dir is not None else [])
    trained = lora.trained_parameters(config)
    outputs = RunOutputs(
        folder,
        config,
        events,
        health,
        MachineWatch(disks, 12 * trained),
        fingerprint=data.train.fingerprint,
        steps_per_epoch=data.order.steps_per_epoch,
        device=engine.device,
        may_write=may_write,
        step=state.step,
        total_steps=data.total_steps,
        world=ranks.world,
        nodes=len(set(nodes)),
        global_batch=data.order.global_batch_size,
        precision=settings.precision,
        zero_stage=engine.stage,
    )
    over = f", {trained:,} of adapters trained over {settings.base}" if settings.base is not None else ""
    at = f", resumed at step {state.step}" if state.step else ""
    outputs.say(
        f"{config.model_name}: {config.num_parameters() / 1e6:.1f}M parameters{over}, {settings.precision}, "
        f"ZeRO-{engine.stage}, {ranks.world} process(es), {data.total_steps} steps of {config.global_batch_size} "
        f"samples{at}"
    )
    if data.order.global_batch_size > data.train.num_samples:
        outputs.say(
            f"WARNING: the global batch of {data.order.global_batch_size} samples is larger than the data, which has "
            f"{data.train.num_samples}: every step is a whole epoch; a smaller --global-batch-size makes more steps"
        )
    placement = _placement(ranks, settings, nodes)
    for text in [*prepared.origin, *settings.report, *kernel, *placement, *data.train.account_lines()]:
        outputs.say(f"  {text}")
    return outputs
