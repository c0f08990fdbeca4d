"""Initialise or resume: the checkpoint that a run goes on from, or the weights that it begins with, and its data; and
what must be the same to go on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lumina import checkpoint
from lumina.chat import ChatTokenizer, copy_files, open_tokenizer
from lumina.checkpoint import TrainerState
from lumina.cluster import first_world
from lumina.config import Config, OnResume, UserError, differences, parse_settings, upgrade
from lumina.data import GlobalOrder, Samples
from lumina.files import atomic_folder, read_text
from lumina.monitor import read_run
from lumina.train.agreement import decided_by_rank_0, together
from lumina.train.chat_template import say_taught, with_template
from lumina.train.deepspeed import Engine, Ranks
from lumina.train.objectives import objective
from lumina.train.outputs.samples import prompts_to_ids
from lumina.train.recovery.record import RecoveryRecord
from lumina.train.saving.snapshot import OnProgress, load_weights
from lumina.train.saving.snapshot import load_checkpoint as load
from lumina.train.schedules import schedule

log = logging.getLogger("lumina")


@dataclass(frozen=True)
class Start:
    """What a start of a run goes on from, the same on every rank. config: as given, with the global batch of the run's
    first start and what the run began with as init_from; checkpoint: None to begin anew, with trainer_state at step 0;
    trainer: what trainer.json says beside trainer_state; recovery: what earlier starts did about trouble; weights: the
    checkpoint whose weights a new run begins with; before: the settings of the start before, None where it is not known
    or there is none; ranks_of_row: sequence_parallel_size as asked for; `config` has what fits this start; first_world:
    how many ranks the launch's first group had, None where it is not known."""

    config: Config
    checkpoint: Path | None
    trainer_state: TrainerState
    trainer: dict[str, Any]
    recovery: RecoveryRecord
    weights: Path | None = None
    before: dict[str, Any] | None = None
    ranks_of_row: int = 1
    first_world: int | None = None

    def origin(self, base: Path | None) -> str:
        """What this start goes on from, for people; `base`: the checkpoint under adapters."""
        if self.checkpoint is not None:
            return f"goes on from {self.checkpoint}, step {self.trainer_state.step}"
        if base is not None:
            return f"begins with new adapters over {base}, step {checkpoint.step_of(base)}"
        if self.weights is not None:
            return f"begins with the weights of {self.weights}, step {checkpoint.step_of(self.weights)}"
        return f"begins from scratch: weights drawn with seed {self.config.seed}"


def find_start(config: Config, folder: Path, ranks: Ranks, job: str | None) -> Start:
    """Look for what --resume means in the run's folder; collective. A start by the launch that made the run's last one
    (a restart, a requeued job) goes on by itself, whatever the world size is now."""
    relaunched = decided_by_rank_0(ranks, lambda: checkpoint.last_global_batch(folder, job))
    if relaunched is not None:
        config = same_batch(config.replace(resume="auto"), relaunched)
    asked, began = config.sequence_parallel_size, first_world()
    # A launch may lose ranks before it has claimed the run's folder: what it began with was no mistake.
    again = relaunched is not None or (began is not None and began % asked == 0)
    fitting = sequence_groups(asked, ranks.world, again)
    if fitting != asked:
        config = config.replace(sequence_parallel_size=fitting)
        if ranks.main:
            log.warning(
                "sequence_parallel_size %d does not divide the %d processes that are left: %d for now",
                asked, ranks.world, fitting,
            )  # fmt: skip
    source = decided_by_rank_0(ranks, lambda: checkpoint_to_resume(config, folder))
    read = lambda: (TrainerState(), {}) if source is None else checkpoint.read_trainer_state(source)
    trainer_state, trainer = together(ranks, "reading the checkpoint", read)
    before = decided_by_rank_0(ranks, lambda: settings_before(config, source, folder))
    if before is not None:
        if source is not None:
            refuse_changes(before, config, source)
        if config.init_from is None and isinstance(weights_from := before.get("init_from"), str):
            config = config.replace(init_from=weights_from)
    if trainer_state.step:
        config = same_batch(config, trainer_state.global_batch_size)
    record = decided_by_rank_0(ranks, lambda: _recovery_record(config, folder))
    if record.global_batch_size is not None:
        config = same_batch(config, record.global_batch_size)
    weights = None
    unknown = config.tokenizer is None and config.chat_template is None
    if source is None and config.init_from is not None and (unknown or not config.lora_rank):
        given, tokenizer = config.init_from, config.tokenizer
        weights = decided_by_rank_0(ranks, lambda: weights_of(given, tokenizer))
    settled = config
    config = together(ranks, "reading the checkpoint", lambda: with_template(settled, source, weights))
    if weights is not None and ranks.main and not config.lora_rank:  # of adapters' base it is said when it is chosen
        say_taught(weights, config)
    return Start(config, source, trainer_state, trainer, record, weights, before, asked, began)


def sequence_groups(size: int, world: int, relaunched: bool) -> int:
    """How many ranks share a row. UserError where the ranks do not make whole groups of `size`. A start by a launch
    that had another one before is given other ranks by what was lost, and goes on with the largest number that divides
    both."""
    if world % size == 0:
        return size
    if relaunched:
        return math.gcd(size, world)
    raise UserError(
        f"sequence_parallel_size {size} does not divide the number of processes, {world}",
        f"Start {size} processes or a multiple (docs/cluster.md), or set it to a divisor of {world}.",
    )


def _recovery_record(config: Config, folder: Path) -> RecoveryRecord:
    """The run's recovery record; a run that is initialised anew has an empty one."""
    return RecoveryRecord.read(folder) if config.resume is not None else RecoveryRecord()


def checkpoint_to_resume(config: Config, folder: Path) -> Path | None:
    """The newest valid checkpoint that --resume means; None to start anew."""
    saved = checkpoint.list_checkpoints(folder / "checkpoints")
    if config.resume is None:
        if saved:
            raise UserError(
                f"{folder} already holds checkpoints (newest {saved[0].name})",
                "Add --resume auto to go on, or choose another --experiment-name.",
            )
        return None
    choices = saved if config.resume == "auto" else checkpoint.candidates(config.resume)
    valid = checkpoint.latest_valid(choices)
    if choices and valid is None:
        raise UserError(f"no checkpoint under {choices[0].parent} is whole", "See the warnings above for each one.")
    return valid


def weights_of(given: str, tokenizer: str | None) -> Path:
    """The newest valid checkpoint that --init-from means, whose model reads the tokens that it will be trained on."""
    valid = checkpoint.latest_valid(checkpoint.candidates(given))
    if valid is None:
        raise UserError(f"no checkpoint of {given} is whole", "See the warnings above for each one.")
    own = valid.parent.parent / "tokenizer"  # as lumina import leaves it
    if own.is_dir() and tokenizer is None:
        raise UserError(
            f"{given} has a tokenizer of its own, and this run would be prepared with Lumina's",
            f"Leave the setting `tokenizer` out, or give {own}.",
        )
    return valid


def load_initial_weights(
    given: str, source: Path | None, config: Config, ranks: Ranks, engine: Engine, progress: OnProgress
) -> None:
    """Begin with another run's weights: step 0, no optimizer state; `source`: where they were found in `given` already;
    collective."""
    if source is None:
        source = decided_by_rank_0(ranks, lambda: weights_of(given, config.tokenizer))
    _check_weights(source, config, ranks, begins=True)
    load_weights(source, engine, progress, partial(together, ranks, "loading the weights"))


def base_of_adapters(
    config: Config, ranks: Ranks, source: Path | None, trainer_state: checkpoint.TrainerState
) -> Path | None:
    """The checkpoint under the adapters that the run trains, chosen by rank 0 for all: what a resumed run's checkpoint
    `source` names, else what --init-from means. None for a run that trains every weight; collective."""
    if source is not None:
        _same_adapters(trainer_state, config, source)
    if not config.lora_rank:
        return None

    def chosen() -> Path:
        if source is not None:
            found = checkpoint.valid_base(source, trainer_state)
            assert found is not None
            return found
        if config.init_from is None:
            raise UserError(
                f"lora_rank {config.lora_rank} trains adapters over the weights of another run, and none is given",
                "Add --init-from RUN (lumina import makes one of a Hugging Face folder), or set lora_rank to 0.",
            )
        return weights_of(config.init_from, config.tokenizer)

    found = decided_by_rank_0(ranks, chosen)
    if ranks.main and source is None:
        say_taught(found, config)
    _check_weights(found, config, ranks, begins=source is None)
    return found


def _check_weights(weights: Path, config: Config, ranks: Ranks, begins: bool) -> None:
    """UserError where the checkpoint that a run begins with is of another shape. Where the run `begins` now, say if it
    may have been trained with other rotary angles, at a context too long for them; collective."""
    state = together(ranks, "reading the checkpoint", lambda: checkpoint.read_trainer_state(weights)[0])
    checkpoint.check_same_model(state.model, checkpoint.model_shape(config), weights)
    as_trained = config.model_copy(update={"seq_length": config.trained_seq_length or 0})
    told = [checkpoint.other_angles(state, one) for one in (as_trained, config)]
    if begins and ranks.main and all(told):
        log.warning("%s: %s", weights, told[0])


def _same_adapters(trainer_state: checkpoint.TrainerState, config: Config, source: Path) -> None:
    own = checkpoint.adapter_settings(config)
    if trainer_state.lora != own:
        there, here = (", ".join(f"{k} {v}" for k, v in one.items()) or "none" for one in (trainer_state.lora, own))
        raise UserError(
            f"{source} has other adapters: {there} there, {here} here",
            "Resume with the run's own configuration (its folder has config.yaml), or start a new run --init-from it.",
        )


def open_run_tokenizer(config: Config) -> ChatTokenizer:
    """The tokenizer of the run. Raises UserError where the model has no room for its ids."""
    tokenizer = open_tokenizer(config.tokenizer, config.chat_template)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model's vocab_size is {config.vocab_size:,}",
            "Set vocab_size to at least as many, or give the tokenizer that belongs to the model.",
        )
    return tokenizer


# --- What must be as it was -----------------------------------------------------------------------


def settings_before(config: Config, source: Path | None, folder: Path) -> dict[str, Any] | None:
    """The settings of the start that wrote the checkpoint `source`, as run.json has them, else config.yaml; where the
    run in `folder` has no checkpoint yet, of its start before. None where there is none or they are not known."""
    if config.resume is None:
        return None
    run = folder if source is None else source.resolve().parent.parent
    recorded = read_run(run).get("config")
    if isinstance(recorded, dict):
        return upgrade(recorded, str(run / "run.json"), warn=False)
    path = run / "config.yaml"
    if not path.is_file():
        if source is not None:
            log.warning("%s has no run.json and no config.yaml beside it: its settings are not compared", source)
        return None
    values, _ = parse_settings(read_text(path), str(path))
    return values


def refuse_changes(before: dict[str, Any], config: Config, source: Path) -> None:
    """UserError for a setting that another run would have: the steps that were taken hang on it."""
    changed = differences(before, config.model_dump(mode="json"), OnResume.REFUSED)
    if changed:
        raise UserError(f"{source} cannot be resumed with {'; '.join(map(str, changed))}: {_WHY_NOT}", _another(source))


_WHY_NOT = "the order of samples, the loss or the learning rates of the steps that were taken would have been others"


def _another(source: Path) -> str:
    run = source.parent.parent
    return f"Leave it as it was, or begin another run with these weights: --init-from {run} --experiment-name NAME."


def check_resumed(start: Start, config: Config, data: TrainingData, ranks: Ranks) -> list[str]:
    """What a resume changes, a line each; `config`: resolved. Raises UserError where data, schedule or the model's
    shape are not those of the checkpoint. Nothing for a run that begins."""
    source, before, now = start.checkpoint, start.before, config.model_dump(mode="json")
    if source is None:
        return []
    checkpoint.check_same_model(start.trainer_state.model, checkpoint.model_shape(config), source)
    if start.trainer_state.data_fingerprint != data.train.fingerprint:
        changed = differences(before or {}, now, OnResume.DATA)
        why = "; ".join(map(str, changed)) or "a file's contents changed"
        raise UserError(
            f"the training data is not what {source} was trained on, so its position in the data means nothing: {why}",
            f"Resume with the same files and data settings. {_another(source)}",
        )
    angles = checkpoint.other_angles(start.trainer_state, config)
    lines = [f"WARNING: {source}: {angles}"] if angles else []
    if before is None:
        return lines
    _refuse_another_schedule(before, config, data, start.trainer_state.step, source)
    lines += [f"changed: {change}" for change in differences(before, now, OnResume.SHOWN, OnResume.SCHEDULE)]
    given, size = start.config, config.global_batch_size
    made = given.batch_size * given.gradient_accumulation_steps * ranks.data_world
    if made != size:
        on = f"{ranks.data_world} " + (
            "process(es)" if ranks.sequence == 1 else f"group(s) of {ranks.sequence} processes"
        )
        lines.append(
            f"kept: the global batch of {size} samples, of the run's first start (batch_size {given.batch_size} x "
            f"gradient_accumulation_steps {given.gradient_accumulation_steps} x {on} would make {made})"
        )
    return lines


def _refuse_another_schedule(
    before: dict[str, Any], config: Config, data: TrainingData, step: int, source: Path
) -> None:
    """UserError where a step that was taken would have had another learning rate. The rate's own size may change:
    schedules are compared at the size that it had."""
    changed = differences(before, config.model_dump(mode="json"), OnResume.SCHEDULE)
    if not changed:
        return
    rates = {name: before[name] for name in ("learning_rate", "min_lr") if name in before}
    then = {change.name: change.before for change in changed}
    now, was = config.replace(**rates), config.replace(**rates, **then)
    after = schedule(now, data.total_steps)
    planned = schedule(was, total_steps(was, data.order))
    wrong = next((taken for taken in range(step) if after(taken) != planned(taken)), None)
    if wrong is not None:
        raise UserError(
            f"{source} cannot be resumed with {'; '.join(map(str, changed))}: step {wrong + 1} of the {step} that were "
            f"taken had the learning rate {planned(wrong):.3g} and would have had {after(wrong):.3g}",
            _another(source),
        )


def load_resumed(start: Start, ranks: Ranks, engine: Engine, progress: OnProgress) -> None:
    """Load the checkpoint that the run goes on from; collective."""
    assert start.checkpoint is not None
    load(start.checkpoint, engine, start.trainer, progress, partial(together, ranks, "loading the checkpoint"))


@dataclass(frozen=True)
class TrainingData:
    """What a run is trained and evaluated on, in which order, and for how many steps altogether. tokenizer: ids to text
    only, since its files may be gone once the run has begun; sample_prompts: the ids of each."""

    tokenizer: ChatTokenizer
    sample_prompts: dict[str, list[int]]
    train: Samples
    evaluation: Samples | None
    order: GlobalOrder
    total_steps: int


def open_data(
    start: Start, config: Config, ranks: Ranks, progress: Callable[[int, int], None] | None = None
) -> TrainingData:
    """The run's data, prepared where that was not done yet; collective. `config`: resolved; `progress`: told the bytes
    that have been prepared, and all of them; without it the log is. Raises UserError."""
    prepare = partial(_prepare, config, start.trainer_state.data_fingerprint or None, progress)
    leader = ranks.local_rank == 0  # of its node; the others find the cache that it leaves
    early = together(ranks, "preparing the data", lambda: prepare() if leader else None)
    tokenizer, asked, train, evaluation = together(ranks, "opening the data", lambda: early or prepare())
    assert config.global_batch_size is not None
    order = GlobalOrder(train.num_samples, config.global_batch_size, config.seed, train.fingerprint)
    return TrainingData(tokenizer, asked, train, evaluation, order, total_steps(config, order))


def total_steps(config: Config, order: GlobalOrder) -> int:
    """Steps of the whole run."""
    steps = config.epochs * order.steps_per_epoch
    return min(steps, config.max_steps or steps)


def _prepare(
    config: Config, resumed: str | None, progress: Callable[[int, int], None] | None
) -> tuple[ChatTokenizer, dict[str, list[int]], Samples, Samples | None]:
    """The tokenizer, the ids of the sample prompts, and the data to train and to evaluate on; `resumed`: the
    fingerprint of what the run has been trained on."""
    tokenizer = open_run_tokenizer(config)
    asked = prompts_to_ids(tokenizer, config.sample_prompts)
    return tokenizer, asked, *objective(config).prepare_data(tokenizer, resumed=resumed, progress=progress)


def keep_tokenizer(config: Config, folder: Path) -> Config:
    """Copy an imported model's tokenizer into the run's folder, where generation and export look for it, and name it
    there. The copy appears whole or not at all. Rank 0 only."""
    if config.tokenizer is None:
        return config
    source, own = Path(config.tokenizer), folder / "tokenizer"
    if source.resolve() != own.resolve():
        with atomic_folder(own, replace=True) as scratch:
            copy_files(source, scratch)
    return config.replace(tokenizer=own.name)  # found beside config.yaml, wherever the folder is moved


def same_batch(config: Config, size: int) -> Config:
    """The global batch of the run's first start holds for all later ones (law 1), whatever the world size is now."""
    wanted = config.global_batch_size
    if wanted is not None and wanted != size:
        raise UserError(
            f"the run was started with global_batch_size {size}, not {wanted}",
            "Drop global_batch_size to go on, or start another run: the order of samples depends on it.",
        )
    return config.replace(global_batch_size=size)
