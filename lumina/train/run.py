"""A run: everything it needs, built in order, like a recipe."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lumina import checkpoint
from lumina.chat import ChatTokenizer, open_tokenizer
from lumina.checkpoint import TrainerState, check_same_model, model_shape
from lumina.cluster import StopRequest
from lumina.config import Config, UserError
from lumina.config import deepspeed as ds_json
from lumina.config.versions import refuse_untried
from lumina.data import GlobalOrder, Loader
from lumina.model import Transformer, float8, keep_heap, lora, report_kernel
from lumina.monitor import Console, EventLog, MetricsFile, Recorder
from lumina.plan import default_document, smallest_memory
from lumina.train.deepspeed import engine, partitioned_init
from lumina.train.deepspeed.fragments import allocate_optimizer_state, restore_engine, snapshot_engine
from lumina.train.deepspeed.layers import LayerStats
from lumina.train.deferred import Deferred
from lumina.train.determinism import set_deterministic
from lumina.train.health import Health, LayerFigures, LayerObservation, MachineWatch
from lumina.train.initialise import (
    agree,
    base,
    choose,
    keep_tokenizer,
    prepare_data,
    same_batch,
    start_from,
)
from lumina.train.loop import fit
from lumina.train.objectives import Preparation, objective
from lumina.train.outputs.profiling import Profile
from lumina.train.outputs.samples import answers
from lumina.train.outputs.throughput import Utilisation
from lumina.train.recovery.recovery import FILE as ANSWERS
from lumina.train.recovery.recovery import Answers, Memory
from lumina.train.recovery.spikes import Guard
from lumina.train.saves import Saves
from lumina.train.schedules import schedule
from lumina.train.snapshot import load_checkpoint, load_frozen_weights
from lumina.train.stragglers import Stragglers
from lumina.train.watchdog import Watchdog

log = logging.getLogger("lumina")
# What the console shows is kept in the run's log too, without being printed a second time.
record_log = logging.getLogger("lumina.record")
record_log.propagate = False
record_log.setLevel(logging.INFO)


def train(config: Config) -> int:
    """Train as `config` says, on however many ranks the launcher started. Returns the exit code: 0 when the run is
    complete, signals.EXIT_STOPPED when a signal stopped it after a save."""
    refuse_untried()
    keep_heap()
    if config.deterministic:
        set_deterministic()
    ranks = engine.join()
    with Run(config, ranks) as run:
        code = fit(run)
    engine.leave()
    return code


class Run:
    """What `fit` works on. Building one joins no process group and starts no step."""

    def __init__(self, config: Config, ranks: engine.Ranks) -> None:
        self.ranks = ranks
        self.stop = StopRequest()
        self.watchdog = Watchdog(config.hang_timeout, config.stop_timeout, self.stop, ranks.rank)
        self.stragglers = Stragglers(ranks, config.straggler_interval, config.straggler_factor)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.folder = Path(config.output_dir) / config.experiment_name
        config = self._same_launch(config)
        source, progress, trainer = self._find_checkpoint(config)
        if progress.step:
            config = same_batch(config, progress.global_batch_size)
        memory = self._memory_of_answers(config)
        if memory.global_batch_size is not None:
            config = same_batch(config, memory.global_batch_size)
        document = default_document(config, ranks.world, smallest_memory())
        self.ds_config, report, self.config = ds_json.resolve(config, ranks.world, device, document=document)
        if memory.batch_size is not None and memory.batch_size < self.config.batch_size:
            self._take_micro_batches_of(memory.batch_size)
        ds_config, config = self.ds_config, self.config
        precision = next((n for n in ("bf16", "fp16") if ds_config.get(n, {}).get("enabled")), "fp32")
        assert config.global_batch_size is not None  # filled in by `resolve`
        self.global_batch = config.global_batch_size
        self.tokenizer = self._open_tokenizer()
        self.train_data, self.eval_data = prepare_data(
            self.config, self.tokenizer, ranks, progress.data_fingerprint or None
        )
        self.order = GlobalOrder(
            self.train_data.num_samples, self.global_batch, config.seed, self.train_data.fingerprint
        )
        steps = config.epochs * self.order.steps_per_epoch
        self.total_steps = min(steps, config.max_steps or steps)
        self.schedule = schedule(config, self.total_steps)
        self.base = base(config, ranks, source, progress)
        torch.manual_seed(config.seed)
        self.engine = self._build_engine(drawn=source is None and config.init_from is None)
        self.progress = progress
        self.progress.global_batch_size, self.progress.world = self.global_batch, ranks.world
        self.progress.precision, self.progress.zero_stage = precision, self.engine.stage
        self._prepare_objective(resumed=source is not None)
        if source is not None:
            self._resume(source, trainer)
        else:
            self._start_from()
        self.progress.lora = checkpoint.adapter_settings(config)
        self.progress.base = {} if self.base is None else checkpoint.base_reference(self.base, self.folder)
        self.progress.model, self.progress.data_fingerprint = model_shape(config), self.train_data.fingerprint
        self.start_step = self.progress.step
        self.guard = Guard(config, self.progress.guard)
        self.utilisation = Utilisation(config, precision, device == "cuda")
        self._open_folder(report, precision)
        self.saves = Saves(self)
        self.answers = Answers(self, memory)
        self.deferred = Deferred(self)
        self.layers: LayerStats | None = None
        self.machine = MachineWatch(self._disks(), 12 * lora.trained_parameters(config)) if ranks.main else None
        self.sound = True  # False while an update is being made

    # --- Building ---

    def _build_engine(self, drawn: bool) -> engine.Engine:
        """`drawn`: False where every trained weight is loaded next; adapters are drawn after the weights under them."""
        drawn = drawn or self.base is not None
        with partitioned_init.partitioned(self.ds_config, drawn):
            model = Transformer(self.config)
            if self.base is not None:  # before the engine is made: what is frozen has no place in its optimizer
                lora.attach(model, self.config)
        if self.base is not None:
            load_frozen_weights(model, self.base)
        if self.config.float8 is not None:
            float8.check(self.config)
            float8.convert(model, self.config.float8)
        model.checkpoint_every = self.config.checkpoint_every
        if self.config.compile:
            model.compile_blocks()
        made = engine.Engine(model, self.config, self.ds_config)
        allocate_optimizer_state(made)
        return made

    def _memory_of_answers(self, config: Config) -> Memory:
        """What earlier starts of this run learned (answers.json); a run that begins anew has learned nothing."""
        found = [Memory()]
        if self.ranks.main and config.resume is not None:
            found = [Memory.read(self.folder)]
        elif self.ranks.main:
            (self.folder / ANSWERS).unlink(missing_ok=True)
        dist.broadcast_object_list(found)
        return found[0]

    def _take_micro_batches_of(self, size: int) -> None:
        """Set another micro-batch; the global batch, which laws 1 and 2 hang on, stays."""
        world, wanted = self.ranks.world, self.config.global_batch_size
        assert wanted is not None
        accumulation = -(-wanted // (size * world))
        self.config = self.config.replace(batch_size=size, gradient_accumulation_steps=accumulation)
        self.ds_config = {
            **self.ds_config,
            "train_micro_batch_size_per_gpu": size,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": size * accumulation * world,
        }

    def rebuild(self, batch_size: int) -> None:
        """A fresh engine for another micro-batch with the weights and optimizer state of this one; collective. What the
        old one had half done, and the memory that it held, is gone."""
        snapshot, rng = snapshot_engine(self.engine), torch.get_rng_state()
        self.engine.close()
        del self.engine
        self.layers = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._take_micro_batches_of(batch_size)
        self.engine = self._build_engine(drawn=False)
        restore_engine(self.engine, snapshot)
        torch.set_rng_state(rng)

    def _disks(self) -> list[Path]:
        backups = self.config.backup_dir
        return [self.checkpoints] + ([Path(backups)] if backups is not None else [])

    def _same_launch(self, config: Config) -> Config:
        """A start by the launch that made the run's last one (a restart, a requeued job) goes on from its newest
        checkpoint, with the global batch of its first start, whatever the world size is now."""
        found: list[Any] = [None]
        if self.ranks.main:
            found = [checkpoint.last_global_batch(self.folder, os.environ.get("LUMINA_JOB"))]
        dist.broadcast_object_list(found)
        return config if found[0] is None else same_batch(config.replace(resume="auto"), found[0])

    def _find_checkpoint(self, config: Config) -> tuple[Path | None, TrainerState, dict[str, Any]]:
        """The checkpoint to go on from, chosen by rank 0 for all."""
        source = agree(self.ranks, lambda: choose(config, self.folder))
        progress, trainer = checkpoint.read_trainer_state(source) if source is not None else (TrainerState(), {})
        return source, progress, trainer

    def _open_tokenizer(self) -> ChatTokenizer:
        tokenizer = open_tokenizer(self.config.tokenizer)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size:,} ids, the model's vocab_size is {self.config.vocab_size:,}",
                "Set vocab_size to at least as many, or give the tokenizer that belongs to the model.",
            )
        return tokenizer

    def _start_from(self) -> None:
        """Another run's weights, unless they are there already, under adapters."""
        if self.base is None and self.config.init_from is not None:
            start_from(self.config.init_from, self.config, self.ranks, self.engine)

    def _prepare_objective(self, resumed: bool) -> None:
        objective(self.config).prepare(
            Preparation(
                train_data=self.train_data,
                eval_data=self.eval_data,
                folder=self.folder,
                rank=self.ranks.rank,
                world=self.ranks.world,
                micro_batch_size=self.config.batch_size,
                resumed=resumed,
                initialise=self._start_from,
                forward=self.engine.forward,
                evaluation=self.engine.evaluation,
                device=self.engine.device,
                heartbeat=self.watchdog.beat,
            )
        )

    def _resume(self, source: Path, trainer: dict[str, Any]) -> None:
        check_same_model(self.progress.model, model_shape(self.config), source)
        if self.progress.data_fingerprint != self.train_data.fingerprint:
            raise UserError(
                f"the training data is not what {source} was trained on, so its position in the data means nothing",
                "Resume with the same files and data settings, or start a run with another --experiment-name.",
            )
        load_checkpoint(source, self.engine, trainer)

    def _open_folder(self, report: Iterable[str], precision: str) -> None:
        """The run's folder with its resolved configuration, log and metrics. Rank 0 writes."""
        self.checkpoints = self.folder / "checkpoints"
        title = f"{self.config.experiment_name} · {self.ranks.world} process(es), ZeRO-{self.engine.stage}, {precision}"
        self.console = Console(self.ranks.main, self.total_steps, self.start_step, title, self.config.live_view)
        self.events = EventLog(self.folder / "events.jsonl" if self.ranks.main else None)
        self.health = Health(self.config, self.events)
        self.metrics: MetricsFile | None = None
        self.profile: Profile | None = None
        kernel = report_kernel(self.engine.device, precision)  # on every rank: chosen here, not in its first step
        if not self.ranks.main:
            return
        self.lock = checkpoint.RunLock(self.folder, os.environ.get("LUMINA_JOB"), self.global_batch)
        for name in ("checkpoints", "backups"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(keep_tokenizer(self.config, self.folder).to_yaml())
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.start_step)
        self._handler = logging.FileHandler(self.folder / "train.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for logger in (log, record_log):
            logger.addHandler(self._handler)
        config, data = self.config, self.train_data
        millions, trained = config.num_parameters() / 1e6, lora.trained_parameters(config)
        over = f", {trained:,} of adapters trained over {self.base}" if self.base is not None else ""
        at = f", resumed at step {self.start_step}" if self.start_step else ""
        self._say(
            f"{config.model_name}: {millions:.1f}M parameters{over}, {precision}, ZeRO-{self.engine.stage}, "
            f"{self.ranks.world} process(es), {self.total_steps} steps of {self.global_batch} samples{at}"
        )
        for text in [*report, *kernel, *data.account_lines()]:
            self._say(f"  {text}")
        self.profile = Profile(self.folder, self.start_step) if config.profile else None
        self.recorder = Recorder(
            self.folder,
            config,
            self.metrics,
            data.fingerprint,
            step=self.start_step,
            total_steps=self.total_steps,
            world=self.ranks.world,
            nodes=self.ranks.world // self.ranks.local_world,
            global_batch=self.global_batch,
            precision=precision,
            zero_stage=self.engine.stage,
        )
        self.events.listeners += [self.recorder.event, self.console.event]
        self.console.replay(self.folder / "metrics.jsonl")

    def __enter__(self) -> Run:
        self.watchdog.__enter__()
        self.console.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.deferred.note(wait=False)
        except Exception as error:  # what ended the run is what the user must hear of, and the rest is to be closed
            log.error("the record of the last step is lost: %s: %s", type(error).__name__, error)
        self.watchdog.__exit__(*exception)
        self.console.__exit__(*exception)
        self.saves.stop_waiting(5.0)
        if self.machine is not None:
            self.machine.close()
        if self.metrics is not None:
            if self.profile is not None:
                self.profile.close()
            self.recorder.close(*self._end(*exception[:2]))
            self.metrics.close()
            for logger in (log, record_log):
                logger.removeHandler(self._handler)
            self._handler.close()

    def _end(self, kind: type[BaseException] | None, error: BaseException | None) -> tuple[str, int, str]:
        """How the run ended: its state, step, and why."""
        if kind is not None:
            return "stopped" if kind is KeyboardInterrupt else "failed", self.progress.step, f"{kind.__name__}: {error}"
        patience = self.config.early_stopping_patience
        done = self.progress.step == self.total_steps
        if done or (patience is not None and self.progress.evaluations_without_gain >= patience):
            return "finished", self.progress.step, "" if done else f"no better evaluation in {patience}"
        return "stopped", self.progress.step, f"signal {self.stop.signal}" if self.stop.signal else ""

    # --- Running ---

    def loader(self) -> Loader:
        return Loader(
            self.train_data,
            self.order,
            rank=self.ranks.rank,
            world=self.ranks.world,
            micro_batch_size=self.config.batch_size,
            start_step=self.progress.step,
            stop_step=self.total_steps,
            replace_corrupt=self.config.on_corrupt_sample == "zero_weight",
            vocab_size=self.config.vocab_size,
            device=self.engine.device,
        )

    def due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def layer_stats(self, step: int) -> LayerStats | None:
        """The layers' statistics, at the steps that are due for them."""
        every = self.config.layer_stats_every
        if not every or step % every:
            return None
        if self.layers is None:
            self.layers = LayerStats(self.engine)
        return self.layers

    def record_layers(self, step: int, figures: dict[str, LayerFigures]) -> None:
        if self.metrics is not None:
            self.metrics.write("layers", step, {"layers": {name: asdict(value) for name, value in figures.items()}})
            self.health.layers(LayerObservation(step, figures))

    def rewind_records(self) -> None:
        """The run went back: later steps will be recorded again."""
        if self.metrics is not None:
            self.metrics.rewind(self.progress.step)
            self.recorder.rewind(self.progress.step)

    def profile_step(self) -> None:
        if self.profile is not None:
            self.profile.step()

    def compare_ranks(self) -> None:
        """Every so many steps: which rank is slower than the others, and where it runs; collective."""
        found = self.stragglers.compare(self.progress.step)
        if found is not None and self.metrics is not None:
            self.metrics.write("ranks", self.progress.step, found.record())
            for text in found.slow():
                self.health.report("straggler", "warn", text)

    def record_evaluation(self, loss: float, ppl: float, seconds: float) -> None:
        if self.metrics is not None:
            self.metrics.evaluation(self.progress.step, loss, ppl, seconds)
            self.console.evaluation(self.progress.step, loss)
            self.health.evaluation(self.progress.step, loss)
            self._say(f"Eval at step {self.progress.step} | Loss: {loss:.6f} | PPL: {ppl:.2f} | {seconds:.1f}s")

    def answer_samples(self) -> None:
        """Keep the model's answers to the configured prompts; collective."""
        if not self.config.sample_prompts:
            return
        beat, config = self.watchdog.beat, self.config
        said = answers(self.engine, self.tokenizer, config.sample_prompts, config.sample_tokens, beat)
        if self.metrics is not None:
            self.recorder.samples(self.progress.step, said)

    def _say(self, text: str) -> None:
        self.console.say(text)
        record_log.info(text)
