"""Model loading: from a path that a user gives to a model in evaluation mode, with its tokenizer.

A path is a run's folder (its best checkpoint, or the newest when none was evaluated), RUN/best, or one checkpoint. Only
Lumina's own checkpoints are read, whose hashes are checked first: safetensors and JSON, never a pickle.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from lumina.chat import ChatTokenizer, open_tokenizer, recorded_template
from lumina.checkpoint import (
    TRAINER,
    ManifestError,
    TrainerState,
    base_checkpoint,
    iter_weights,
    latest_valid,
    model_choices,
    other_angles,
    rank_files,
    read_trainer_state,
)
from lumina.config import ModelConfig, UserError, parse_settings
from lumina.config import precision as precisions
from lumina.files import read_text
from lumina.model import Transformer, keep_heap

log = logging.getLogger("lumina")

# Tokens of a long prompt or text that the feed-forward has at a time: what it has inside for all of a million tokens
# is 86 GB at Llama 8B's widths.
_TILE_TOKENS = 4096

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer and template, and where both came from."""

    model: Transformer
    tokenizer: ChatTokenizer
    checkpoint: Path
    step: int

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def context_length(self) -> int:
        """The most tokens that prompt and answer have together."""
        return self.model.config.seq_length


def find_checkpoint(path: str | Path) -> Path:
    """The valid checkpoint that a path means. Damaged ones are reported and skipped.

    Raises:
        UserError: nothing there, a file in a format that is not read, or no whole checkpoint.
    """
    choices = model_choices(path)
    valid = latest_valid(choices)
    if valid is None:
        raise UserError(f"no checkpoint under {choices[0].parent} is whole", "See the warnings above for each one.")
    return valid


def read_config(checkpoint: Path) -> ModelConfig:
    """The model's shape, from the run's config.yaml; settings of training are not looked at."""
    path = checkpoint.parent.parent / "config.yaml"
    try:
        text = read_text(path)
    except OSError as error:
        remedy = "A checkpoint is used from inside its run's folder."
        raise UserError(f"cannot read {path}: {error.strerror}", remedy) from None
    values, _ = parse_settings(text, str(path))
    try:
        return ModelConfig(**{name: value for name, value in values.items() if name in ModelConfig.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def check_size(checkpoint: Path, config: ModelConfig) -> None:
    """Check config.yaml's shape before memory of that size is allocated: raises UserError where the checkpoint's files
    are far too small for the model. Those of adapters are as small as they are: their base checkpoint is looked at."""
    while (base := base_checkpoint(checkpoint, trainer_state_of(checkpoint))) is not None:
        checkpoint = base
    try:
        held = sum(path.stat().st_size for path in rank_files(checkpoint))
    except (ManifestError, OSError) as error:
        raise UserError(f"{checkpoint} cannot be read: {error}") from None
    wanted = 4 * config.num_parameters()
    if wanted > 4 * held:  # what is off by less is named with the tensor that it concerns
        raise UserError(
            f"{checkpoint} holds {held:,} bytes, its config.yaml describes a model of {wanted:,}",
            "The run's config.yaml does not belong to this checkpoint.",
        )


def weights(checkpoint: Path, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The float32 weights by name, adapters merged, one at a time: memory for the largest one is enough.

    Raises:
        UserError: the checkpoint has other parameters than the model.
    """
    check_size(checkpoint, config)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
    try:
        trainer_state_of(checkpoint)
        yield from iter_weights(checkpoint, shapes)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint} cannot be read: {error}") from None


def trainer_state_of(checkpoint: Path) -> TrainerState:
    """Where the run stood, from trainer.json. Raises UserError when it is not what training writes."""
    try:
        return read_trainer_state(checkpoint)[0]
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / TRAINER} cannot be read: {error}") from None


def tokenizer_folder(checkpoint: Path) -> Path | None:
    """The folder of an imported model's own tokenizer; None when the model has Lumina's."""
    folder = checkpoint.parent.parent / "tokenizer"
    return folder if folder.is_dir() else None


def read_tokenizer(checkpoint: Path, step_seconds: float | None = None) -> ChatTokenizer:
    """The tokenizer and template that the checkpoint's model was trained with; `step_seconds`: see open_tokenizer."""
    folder = tokenizer_folder(checkpoint)
    return open_tokenizer(folder, recorded_template(trainer_state_of(checkpoint).chat_template), step_seconds)


def fitting_tokenizer(checkpoint: Path, config: ModelConfig, step_seconds: float | None = None) -> ChatTokenizer:
    """The same, seen to fit the model. Raises UserError when it does not."""
    tokenizer = read_tokenizer(checkpoint, step_seconds)
    if max(tokenizer.stop_ids) >= config.vocab_size:
        raise UserError(
            f"{checkpoint}: the model's {config.vocab_size:,} ids leave out its tokenizer's stop token",
            "The run's config.yaml or its tokenizer folder is not the one that it was trained with.",
        )
    if tokenizer.folder is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{checkpoint}: the tokenizer has {tokenizer.vocab_size:,} ids, the model only {config.vocab_size:,}",
            "Import the model again with --grow-vocabulary, or put the tokenizer that belongs to it into the run.",
        )
    return tokenizer


def choose_dtype(precision: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where and in what to compute: the GPU when there is one; bf16 where the device multiplies it, since decoding is
    bound by the bytes of the weights (benchmarks/generate.py)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, _DTYPES[precisions.resolve(precision, device.type)]


@torch.no_grad()
def load(path: str | Path, precision: str = "auto", step_seconds: float | None = None) -> Loaded:
    """Load the model that `path` means (see find_checkpoint), in evaluation mode, on the GPU when there is one.
    `step_seconds`: see open_tokenizer."""
    keep_heap()
    checkpoint = find_checkpoint(path)
    config = read_config(checkpoint)
    check_size(checkpoint, config)
    device, dtype = choose_dtype(precision)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:  # to_empty gives each use of a shared weight a tensor of its own
        model.output.weight = model.embedding.weight
    parameters = dict(model.named_parameters())
    for name, weight in weights(checkpoint, config):
        parameters[name].copy_(weight)
    model.requires_grad_(False).eval()
    model.tile_feed_forward(_TILE_TOKENS)
    tokenizer, state = fitting_tokenizer(checkpoint, config, step_seconds), trainer_state_of(checkpoint)
    if angles := other_angles(state, config):
        log.warning("%s: %s", checkpoint, angles)
    return Loaded(model, tokenizer, checkpoint, state.step)
