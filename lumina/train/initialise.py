"""Initialise or resume: the checkpoint that a run goes on from, or the weights that it begins with, and its data; and
what must be the same to go on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lumina import checkpoint
from lumina.chat import ChatTokenizer, copy_files, open_tokenizer
from lumina.checkpoint import TrainerState
from lumina.config import Config, UserError
from lumina.data import GlobalOrder, Samples
from lumina.files import atomic_folder
from lumina.train.agreement import decided_by_rank_0
from lumina.train.deepspeed import Engine, Ranks
from lumina.train.objectives import objective
from lumina.train.recovery.record import RecoveryRecord
from lumina.train.saving.snapshot import load_checkpoint as load
from lumina.train.saving.snapshot import load_weights


@dataclass(frozen=True)
class Start:
    """What a start of a run goes on from, the same on every rank. config: as given, with the global batch of the run's
    first start; checkpoint: None to begin anew, with trainer_state at step 0; trainer: what trainer.json says beside
    trainer_state; recovery: what earlier starts did about trouble."""

    config: Config
    checkpoint: Path | None
    trainer_state: TrainerState
    trainer: dict[str, Any]
    recovery: RecoveryRecord


def find_start(config: Config, folder: Path, ranks: Ranks) -> Start:
    """Look for what --resume means in the run's folder; collective. A start by the launch that made the run's last one
    (a restart, a requeued job) goes on by itself, whatever the world size is now."""
    job = os.environ.get("LUMINA_JOB")
    relaunched = decided_by_rank_0(ranks, lambda: checkpoint.last_global_batch(folder, job))
    if relaunched is not None:
        config = same_batch(config.replace(resume="auto"), relaunched)
    source = decided_by_rank_0(ranks, lambda: checkpoint_to_resume(config, folder))
    trainer_state, trainer = checkpoint.read_trainer_state(source) if source is not None else (TrainerState(), {})
    if trainer_state.step:
        config = same_batch(config, trainer_state.global_batch_size)
    record = decided_by_rank_0(ranks, lambda: _recovery_record(config, folder))
    if record.global_batch_size is not None:
        config = same_batch(config, record.global_batch_size)
    return Start(config, source, trainer_state, trainer, record)


def _recovery_record(config: Config, folder: Path) -> RecoveryRecord:
    """The run's recovery record; a run that is initialised anew has an empty one."""
    if config.resume is not None:
        return RecoveryRecord.read(folder)
    RecoveryRecord.remove(folder)
    return RecoveryRecord()


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


def load_initial_weights(given: str, config: Config, ranks: Ranks, engine: Engine) -> None:
    """Begin with another run's weights: step 0, no optimizer state; collective."""
    source = decided_by_rank_0(ranks, lambda: weights_of(given, config.tokenizer))
    checkpoint.check_same_model(checkpoint.read_trainer_state(source)[0].model, checkpoint.model_shape(config), source)
    load_weights(source, engine)


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
    checkpoint.check_same_model(checkpoint.read_trainer_state(found)[0].model, checkpoint.model_shape(config), found)
    return found


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
    tokenizer = open_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model's vocab_size is {config.vocab_size:,}",
            "Set vocab_size to at least as many, or give the tokenizer that belongs to the model.",
        )
    return tokenizer


def load_resumed(start: Start, config: Config, fingerprint: str, engine: Engine) -> None:
    """Load the checkpoint that the run goes on from; collective. `fingerprint`: of the training data. Raises UserError
    where model or data are not those of the checkpoint."""
    assert start.checkpoint is not None
    checkpoint.check_same_model(start.trainer_state.model, checkpoint.model_shape(config), start.checkpoint)
    if start.trainer_state.data_fingerprint != fingerprint:
        raise UserError(
            f"the training data is not what {start.checkpoint} was trained on, so its position in the data means "
            "nothing",
            "Resume with the same files and data settings, or start a run with another --experiment-name.",
        )
    load(start.checkpoint, engine, start.trainer)


@dataclass(frozen=True)
class TrainingData:
    """What a run is trained and evaluated on, in which order, and for how many steps altogether."""

    tokenizer: ChatTokenizer
    train: Samples
    evaluation: Samples | None
    order: GlobalOrder
    total_steps: int


def open_data(start: Start, config: Config, ranks: Ranks) -> TrainingData:
    """The run's data, prepared where that was not done yet; collective. `config`: resolved. Raises UserError."""
    tokenizer = open_run_tokenizer(config)
    train, evaluation = prepare_data(config, tokenizer, ranks, start.trainer_state.data_fingerprint or None)
    assert config.global_batch_size is not None
    order = GlobalOrder(train.num_samples, config.global_batch_size, config.seed, train.fingerprint)
    steps = config.epochs * order.steps_per_epoch
    return TrainingData(tokenizer, train, evaluation, order, min(steps, config.max_steps or steps))


def prepare_data(
    config: Config, tokenizer: ChatTokenizer, ranks: Ranks, resumed: str | None
) -> tuple[Samples, Samples | None]:
    """The data to train and to evaluate on; `resumed`: the fingerprint of what the run has been trained on. Rank 0 of
    each node prepares; the others find the cache it left."""

    def both() -> tuple[Samples, Samples | None]:
        return objective(config).prepare_data(tokenizer, resumed=resumed)

    failure: list[Any] = [None] * ranks.world
    own: UserError | None = None
    data: tuple[Samples, Samples | None] | None = None
    if ranks.local_rank == 0:
        try:
            data = both()
        except UserError as error:
            own = error
    dist.all_gather_object(failure, own)
    for refusal in failure:
        if refusal is not None:
            raise refusal
    return data if data is not None else both()


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
