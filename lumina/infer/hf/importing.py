"""`lumina import`: a Llama-shaped Hugging Face folder as a run that every other command takes.

The result looks like a run at step 0: config.yaml, one checkpoint with a manifest, and, when the tokenizer is not
Lumina's own, the tokenizer's files. What this model cannot represent exactly is refused by name before anything is
written. Weights are read from safetensors only, one tensor at a time; an index cannot name a file outside its folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from lumina.chat import STOPS, Tokenizer, copy_files, open_tokenizer, read_json
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
from lumina.model import Transformer
from lumina.model.families import family_of, read_hf_config

_SHARD = 2 * 10**9  # bytes of float32 weights in memory and in a file at a time
_IGNORED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry; they follow from rope_theta


def import_hf(source: str | Path, out: str | Path) -> Path:
    """Turn the Hugging Face folder `source` into the run `out`; returns `out`.

    Raises:
        UserError: what is missing, damaged, or not supported, by name.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds something", "Choose another folder, or remove it first.")
    values = read_json(source / "config.json")[1]
    config = read_hf_config(values)
    with ExitStack() as files:
        tensors = _Tensors(source, files)
        if len(tensors) < config.num_layers:
            raise UserError(f"{source} has {len(tensors)} tensors, too few for {config.num_layers} layers")
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
        tensors.check(shapes, config)
        with atomic_folder(out) as scratch:
            _write_checkpoint(scratch / "checkpoints", tensors, shapes, config)
            own = _copy_tokenizer(source, scratch / "tokenizer", values)
            settings = config.model_dump() | ({"tokenizer": "tokenizer"} if own else {})
            write_text(scratch / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    return out


# --- Weights --------------------------------------------------------------------------------------


class _Tensors:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, source: Path, files: ExitStack) -> None:
        self._source = source
        self._homes: dict[str, Any] = {}
        for path in self._paths():
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a valid safetensors file: {error}") from None
            self._homes |= dict.fromkeys(names, file)

    def __len__(self) -> int:
        return len(self._homes)

    def _paths(self) -> list[Path]:
        index = self._source / "model.safetensors.index.json"
        single = self._source / "model.safetensors"
        if not index.exists():
            if not single.exists():
                pickled = next(
                    (path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self._source.glob(pattern)), None
                )
                if pickled is not None:
                    raise UserError(
                        f"{self._source} has its weights in {pickled}: a pickle, which can run code when it is opened",
                        "Convert it to safetensors where you trust it.",
                    )
                raise UserError(f"{self._source} has no model.safetensors")
            return [single]
        weight_map = read_json(index)[1].get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
                raise UserError(f"{index} names {name!r}, which is not a safetensors file of its own folder")
            if not (self._source / name).is_file():
                raise UserError(f"{index} names {name}, which is missing")
        return [self._source / name for name in names]

    def check(self, shapes: dict[str, torch.Size], config: ModelConfig) -> None:
        """Raise UserError unless the files hold exactly the model's tensors in their shapes."""
        expected: dict[str, tuple[int, ...]] = {}
        for ours, shape in shapes.items():
            expected |= {t.name: (t.rows, *shape[1:]) for t in family_of(config).tensors(ours, config)}
        for name, wanted in expected.items():
            if name not in self._homes:
                raise UserError(f"{self._source} has no tensor {name}")
            stored = self._homes[name].get_slice(name)
            if tuple(stored.get_shape()) != wanted:
                raise UserError(f"{name} has shape {stored.get_shape()}, config.json says {list(wanted)}")
            if stored.get_dtype() not in ("F32", "F16", "BF16"):
                raise UserError(
                    f"{name} has type {stored.get_dtype()}: only float32, float16 and bfloat16 are supported"
                )
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()  # a copy that some files carry
        extra = [n for n in self._homes if n not in expected and n not in tied and not n.endswith(_IGNORED)]
        if extra:
            raise UserError(f"{self._source} has a tensor {sorted(extra)[0]}, which this model has no place for")

    def read(self, ours: str, config: ModelConfig) -> torch.Tensor:
        """One of our parameters, float32."""
        slices = [self._homes[p.name].get_tensor(p.name).float() for p in family_of(config).tensors(ours, config)]
        return torch.cat(slices) if len(slices) > 1 else slices[0]


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


def _write_checkpoint(folder: Path, tensors: _Tensors, shapes: dict[str, torch.Size], config: ModelConfig) -> None:
    """A checkpoint of whole parameters, dealt to as many rank files as memory asks for; no optimizer state."""
    groups = list(_groups(shapes))
    state = TrainerState(model=model_shape(config), world=len(groups))
    trainer = {**asdict(state), "optimizer_step": 0, "loss_scale": {}}

    def snapshots() -> Iterator[Snapshot]:
        for names in groups:
            held = {f"{MASTER}/{name}": [tensors.read(name, config).flatten()] for name in names}
            ranges = {name: [0, shapes[name].numel()] for name in names}
            yield Snapshot(state.step, {"rng/cpu": [torch.get_rng_state()], **held}, ranges, trainer)

    try:
        write_checkpoint(folder, snapshots(), len(groups))
    except SaveError as error:
        raise UserError(f"the checkpoint cannot be written: {error}", "Is the disk full?") from None


# --- Tokenizer ------------------------------------------------------------------------------------


def _copy_tokenizer(source: Path, target: Path, config: dict[str, Any]) -> bool:
    """Keep the model's own tokenizer, unless it is Lumina's, which every installation has. Returns whether it was."""
    if (source / "tokenizer_config.json").exists():
        fingerprint = read_json(source / "tokenizer_config.json")[1].get("lumina_fingerprint")
        if fingerprint == Tokenizer.load().fingerprint:
            if int(config["vocab_size"]) < Tokenizer.load().vocab_size:
                raise UserError(f"{source} says that it has Lumina's tokenizer, but has {config['vocab_size']} ids")
            return False
    if not (source / "tokenizer.json").exists():
        raise UserError(f"{source} has no tokenizer.json", "Save its tokenizer as a fast one with transformers first.")
    copy_files(source, target)
    generation = source / "generation_config.json"
    stops = config.get("eos_token_id")
    if generation.is_file():
        stops = read_json(generation)[1].get("eos_token_id", stops)
    listed = [t for t in (stops if isinstance(stops, list) else [stops]) if type(t) is int]
    if not listed or not all(0 <= token < int(config["vocab_size"]) for token in listed):
        raise UserError(f"{source} names no eos_token_id of its vocabulary, so an answer would never end")
    write_json(target / STOPS, {"stop_ids": listed})
    # Found out now rather than at the first question; the checkpoint is not there yet to be half of a run.
    open_tokenizer(target)
    return True
