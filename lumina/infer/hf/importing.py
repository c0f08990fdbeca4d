"""`lumina import`: a Llama-shaped Hugging Face folder as a run that every other command takes.

The result looks like a run at step 0: config.yaml, one checkpoint with a manifest, import.json (what was decided on the
way), and, when the tokenizer is not Lumina's own, the tokenizer's files. What this model cannot represent exactly is
refused by name before anything is written. One tensor at a time is in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from lumina.chat import STOPS, TEMPLATES, Tokenizer, copy_files, open_tokenizer, read_json
from lumina.checkpoint import (
    MASTER,
    SaveError,
    Snapshot,
    TrainerState,
    model_shape,
    write_checkpoint,
)
from lumina.config import ModelConfig, UserError
from lumina.files import atomic_folder, write_json, write_text
from lumina.infer.hf.paths import check_new_folder, check_source
from lumina.infer.hf.tensors import TensorFiles
from lumina.infer.hf.vocabulary import add_tokens, check_template, find_template, fitting_config
from lumina.model import Transformer
from lumina.model.families import read_hf_config

log = logging.getLogger("lumina")

IMPORT_RECORD = "import.json"
"""In an imported run's folder: what the import decided, one sentence each under `notes`."""
_SHARD = 2 * 10**9  # bytes of float32 weights in memory and in a file at a time


def import_hf(
    source: str | Path,
    out: str | Path,
    *,
    chat_template: str | None = None,
    grow_vocabulary: bool = False,
    context_length: int | None = None,
) -> Path:
    """Turn the Hugging Face folder `source` into the run `out`; returns `out`.

    Args:
        chat_template: for a model that brings none, or in place of its own: the name of a stock template (chatml,
            …) or a file with one in Jinja. It is kept with the tokenizer.
        grow_vocabulary: give the embedding rows for ids that the tokenizer has beyond it, each the mean of the others.
        context_length: a shorter one than the file's, such as that of its sliding window.

    Raises:
        UserError: what is missing, damaged, or not supported, by name.
    """
    source, out = Path(source), Path(out)
    check_new_folder(out)
    check_source(source)
    template = None if chat_template is None else find_template(chat_template)
    notes: list[str] = []
    full = read_json(source / "config.json")[1]
    values = _shortened(full, context_length, notes)
    config = read_hf_config(values)
    if values.get("auto_map"):
        notes.append("config.json names code of its own (auto_map), which is not run")
    with ExitStack() as files:
        tensors = TensorFiles(source, files)
        if len(tensors) < config.num_layers:
            raise UserError(f"{source} has {len(tensors)} tensors, too few for {config.num_layers} layers")
        if config.tie_word_embeddings and tensors.has_own_head(config):
            config = config.model_copy(update={"tie_word_embeddings": False})
            notes.append(
                "config.json ties the output matrix to the embedding, the file has another: the file's is used, "
                "and the model is untied (tie_word_embeddings: false)"
            )
        tensors.check(_shapes(config), config)
        with atomic_folder(out) as scratch:
            luminas = _own_template(source, values)
            if luminas and template is not None:
                raise UserError(f"{source} has Lumina's own tokenizer, whose template is fixed")
            if not luminas:
                _copy_tokenizer(source, scratch / "tokenizer", values, template, notes)
                config = fitting_config(scratch / "tokenizer", config, grow_vocabulary, notes)
            _write_checkpoint(scratch / "checkpoints", tensors, config, luminas)
            settings = (
                config.model_dump()
                | _trained_at(config, full)
                | ({"chat_template": luminas} if luminas else {"tokenizer": "tokenizer"})
            )
            write_text(scratch / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
            write_json(
                scratch / IMPORT_RECORD, {"chat_template": chat_template, "notes": notes}, indent=2, sort_keys=False
            )
    for note in notes:
        log.warning("%s: %s", source, note)
    return out


def _shortened(values: dict[str, Any], context_length: int | None, notes: list[str]) -> dict[str, Any]:
    """config.json with a shorter context. Rope scaling that counts from the file's length keeps it, and so do the notes
    and the run's trained_seq_length."""
    if context_length is None:
        return values
    longest = values.get("max_position_embeddings")
    if isinstance(longest, int) and not 2 <= context_length <= longest:
        raise UserError(f"context length {context_length} is not between 2 and the model's {longest}")
    if context_length != longest:
        own = "names none" if longest is None else f"has {longest} (max_position_embeddings)"
        notes.append(f"the context length is {context_length}, as the import was told; the model {own}")
    kept = {} if longest is None else {"original_max_position_embeddings": longest}
    return kept | values | {"max_position_embeddings": context_length}


def _trained_at(config: ModelConfig, values: dict[str, Any]) -> dict[str, int]:
    """The run's setting trained_seq_length, where its context is shorter than that of config.json's `values`."""
    longest = values.get("max_position_embeddings")
    return {"trained_seq_length": longest} if isinstance(longest, int) and longest > config.seq_length else {}


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}


# --- Weights --------------------------------------------------------------------------------------


def _groups(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    group: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = 4 * shape.numel()
        if group and filled + size > _SHARD:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    yield group


def _write_checkpoint(folder: Path, tensors: TensorFiles, config: ModelConfig, chat_template: str) -> None:
    """A checkpoint of whole parameters, dealt to as many rank files as memory asks for; no optimizer state."""
    shapes = _shapes(config)
    groups = list(_groups(shapes))
    state = TrainerState(model=model_shape(config), world=len(groups), chat_template=chat_template)
    trainer = {**asdict(state), "optimizer_step": 0, "loss_scale": {}}

    def snapshots() -> Iterator[Snapshot]:
        for names in groups:
            held = {
                f"{MASTER}/{name}": [_filled(tensors.read(name, shapes[name], config), shapes[name])] for name in names
            }
            ranges = {name: [0, shapes[name].numel()] for name in names}
            yield Snapshot(state.step, {"rng/cpu": [torch.get_rng_state()], **held}, ranges, trainer)

    try:
        write_checkpoint(folder, snapshots(), len(groups))
    except SaveError as error:
        raise UserError(f"the checkpoint cannot be written: {error}", "Is the disk full?") from None


def _filled(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The flat parameter; rows that the file does not have are the mean of those that it has."""
    missing = shape[0] - weight.shape[0]
    if missing:
        weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(missing, -1)])
    return weight.flatten()


# --- Tokenizer ------------------------------------------------------------------------------------


def _own_template(source: Path, config: dict[str, Any]) -> str:
    """The name of Lumina's chat template that the model has with Lumina's tokenizer, which every installation has;
    empty where it has a tokenizer of its own."""
    if not (source / "tokenizer_config.json").exists():
        return ""
    fingerprint = read_json(source / "tokenizer_config.json")[1].get("lumina_fingerprint")
    for tokenizer in map(Tokenizer.load, TEMPLATES):
        if tokenizer.fingerprint == fingerprint:
            if int(config["vocab_size"]) < tokenizer.vocab_size:
                raise UserError(f"{source} says that it has Lumina's tokenizer, but has {config['vocab_size']} ids")
            return tokenizer.chat_template
    return ""


def _copy_tokenizer(
    source: Path, target: Path, config: dict[str, Any], template: tuple[str, str] | None, notes: list[str]
) -> None:
    """Keep the model's own tokenizer."""
    if not (source / "tokenizer.json").exists():
        raise UserError(f"{source} has no tokenizer.json", "Save its tokenizer as a fast one with transformers first.")
    copy_files(source, target, None if template is None else template[1])
    stops = _stop_ids(source, config)
    if not stops or not all(0 <= token < int(config["vocab_size"]) for token in stops):
        raise UserError(f"{source} names no eos_token_id of its vocabulary, so an answer would never end")
    write_json(target / STOPS, {"stop_ids": stops})
    if template is not None:
        add_tokens(target, template[0], notes)
    # Found out now rather than at the first question; the checkpoint is not there yet to be half of a run.
    open_tokenizer(target)
    check_template(target, template, notes)


def _stop_ids(source: Path, config: dict[str, Any]) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: a null in the one does not hide the other's."""
    path = source / "generation_config.json"
    for values in (read_json(path)[1] if path.is_file() else {}, config):
        given = values.get("eos_token_id")
        if given is not None:
            return [token for token in (given if isinstance(given, list) else [given]) if type(token) is int]
    return []
