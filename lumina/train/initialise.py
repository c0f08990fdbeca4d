"""Where a run begins: its newest checkpoint, another run's weights, or nothing; and what must be the same to go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lumina import checkpoint
from lumina.chat import ChatTokenizer, copy_files
from lumina.config import Config, UserError
from lumina.data import Samples
from lumina.files import atomic_folder
from lumina.train.deepspeed.engine import Engine, Ranks
from lumina.train.objectives import objective
from lumina.train.snapshot import load_weights


def agree(ranks: Ranks, choose: Callable[[], Path | None]) -> Path | None:
    """Rank 0's choice, or the UserError it met, on every rank; collective."""
    found: list[Any] = [None]
    if ranks.main:
        try:
            found = [choose()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    chosen: Path | None = found[0]
    return chosen


def choose(config: Config, folder: Path) -> Path | None:
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
    sound = checkpoint.latest_valid(choices)
    if choices and sound is None:
        raise UserError(f"no checkpoint under {choices[0].parent} is whole", "See the warnings above for each one.")
    return sound


def weights_of(given: str, tokenizer: str | None) -> Path:
    """The newest valid checkpoint that --init-from means, whose model reads the tokens that it will be trained on."""
    sound = checkpoint.latest_valid(checkpoint.candidates(given))
    if sound is None:
        raise UserError(f"no checkpoint of {given} is whole", "See the warnings above for each one.")
    own = sound.parent.parent / "tokenizer"  # as lumina import leaves it
    if own.is_dir() and tokenizer is None:
        raise UserError(
            f"{given} has a tokenizer of its own, and this run would be prepared with Lumina's",
            f"Leave the setting `tokenizer` out, or give {own}.",
        )
    return sound


def start_from(given: str, config: Config, ranks: Ranks, engine: Engine) -> None:
    """Begin with another run's weights: step 0, no optimizer state; collective."""
    source = agree(ranks, lambda: weights_of(given, config.tokenizer))
    assert source is not None
    checkpoint.check_same_model(checkpoint.read_trainer_state(source)[0].model, checkpoint.model_shape(config), source)
    load_weights(source, engine)


def base(config: Config, ranks: Ranks, source: Path | None, progress: checkpoint.TrainerState) -> Path | None:
    """The checkpoint under the adapters that the run trains, chosen by rank 0 for all: what a resumed run's checkpoint
    `source` names, else what --init-from means. None for a run that trains every weight; collective."""
    if source is not None:
        _same_adapters(progress, config, source)
    if not config.lora_rank:
        return None

    def chosen() -> Path | None:
        if source is not None:
            return checkpoint.valid_base(source, progress)
        if config.init_from is None:
            raise UserError(
                f"lora_rank {config.lora_rank} trains adapters over the weights of another run, and none is given",
                "Add --init-from RUN (lumina import makes one of a Hugging Face folder), or set lora_rank to 0.",
            )
        return weights_of(config.init_from, config.tokenizer)

    found = agree(ranks, chosen)
    assert found is not None
    checkpoint.check_same_model(checkpoint.read_trainer_state(found)[0].model, checkpoint.model_shape(config), found)
    return found


def _same_adapters(progress: checkpoint.TrainerState, config: Config, source: Path) -> None:
    own = checkpoint.adapter_settings(config)
    if progress.lora != own:
        there, here = (", ".join(f"{k} {v}" for k, v in one.items()) or "none" for one in (progress.lora, own))
        raise UserError(
            f"{source} has other adapters: {there} there, {here} here",
            "Resume with the run's own configuration (its folder has config.yaml), or start a new run --init-from it.",
        )


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
    """The global batch of the run's first start holds for its whole life (law 1), whatever the world size is now."""
    wanted = config.global_batch_size
    if wanted is not None and wanted != size:
        raise UserError(
            f"the run was started with global_batch_size {size}, not {wanted}",
            "Drop global_batch_size to go on, or start another run: the order of samples depends on it.",
        )
    return config.replace(global_batch_size=size)
