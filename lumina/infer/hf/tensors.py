"""The weight files of a Hugging Face folder: which they are, whether they hold the model, and its tensors one by one.

Weights are read from safetensors only; an index cannot name a file outside its folder.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lumina.chat import read_json
from lumina.config import ModelConfig, UserError
from lumina.files import inside
from lumina.model.families import RowSlice, family_of

log = logging.getLogger("lumina")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_IGNORED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry; they follow from rope_theta
_ROWS = 4096  # of two matrices in memory at a time, while they are compared
_LFS = b"version https://git-lfs"


class TensorFiles:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, source: Path, files: ExitStack) -> None:
        """Raises UserError, with the remedy: no weights, weights in another form, or files that are not whole."""
        self._source = source
        self._homes: dict[str, Any] = {}
        held: dict[str, str] = {}
        for path in weight_files(source):
            try:
                file = files.enter_context(safe_open(inside(source, path.name), framework="pt"))
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise _unreadable(path, error) from None
            twice = sorted(held.keys() & set(names))
            if twice:
                raise UserError(
                    f"{twice[0]} is in {held[twice[0]]} and in {path.name} of {source}",
                    "Files of two models lie there: download the model again into an empty folder.",
                )
            held |= dict.fromkeys(names, path.name)
            self._homes |= dict.fromkeys(names, file)

    def __len__(self) -> int:
        return len(self._homes)

    def has_own_head(self, config: ModelConfig) -> bool:
        """Whether the files hold an output matrix that is not the embedding's, which transformers then uses, whatever
        tie_word_embeddings says."""
        table, head = (_name_of(ours, config) for ours in ("embedding.weight", "output.weight"))
        if table not in self._homes or head not in self._homes:
            return False
        ours, theirs = (self._homes[name].get_slice(name) for name in (table, head))
        shape = ours.get_shape()
        if shape != theirs.get_shape() or len(shape) != 2:
            return True
        return any(
            not torch.equal(ours[at : at + _ROWS].float(), theirs[at : at + _ROWS].float())
            for at in range(0, shape[0], _ROWS)
        )

    def check(self, shapes: dict[str, torch.Size], config: ModelConfig) -> None:
        """Raise UserError unless the files hold exactly the model's tensors in their shapes."""
        if config.tie_word_embeddings:
            self._share(config)
        expected: dict[str, tuple[int, ...]] = {}
        for ours, shape in shapes.items():
            parts = self._parts(ours, config)
            stacked = len(shape) == 3 and len(parts) == 1
            expected |= {t.name: tuple(shape) if stacked else (t.rows, *shape[1:][-1:]) for t in parts}
        for name, wanted in expected.items():
            if name not in self._homes:
                raise UserError(f"{self._source} has no tensor {name}")
            stored = self._stored(name)
            if tuple(stored.get_shape()) != wanted:
                raise UserError(f"{name} has shape {stored.get_shape()}, config.json says {list(wanted)}")
            if stored.get_dtype() not in ("F32", "F16", "BF16"):
                raise UserError(
                    f"{name} has type {stored.get_dtype()}: only float32, float16 and bfloat16 are supported"
                )
        # A copy of the embedding that some files carry.
        tied = {_name_of("output.weight", config)} if config.tie_word_embeddings else set()
        extra = [n for n in self._homes if n not in expected and n not in tied and not n.endswith(_IGNORED)]
        if extra:
            raise UserError(f"{self._source} has a tensor {sorted(extra)[0]}, which this model has no place for")

    def _share(self, config: ModelConfig) -> None:
        """Tied matrices may be stored under the output's name alone."""
        table, head = (_name_of(ours, config) for ours in ("embedding.weight", "output.weight"))
        if table not in self._homes and head in self._homes:
            self._homes[table] = _Renamed(self._homes[head], head)

    def _stored(self, name: str) -> Any:
        return self._homes[name].get_slice(name)

    def _parts(self, ours: str, config: ModelConfig) -> list[RowSlice]:
        """The tensors that make up our parameter `ours`, in the first of its family's layouts that the files have."""
        layouts = family_of(config).layouts(ours, config)
        return next((parts for parts in layouts if all(t.name in self._homes for t in parts)), layouts[0])

    def read(self, ours: str, shape: torch.Size, config: ModelConfig) -> torch.Tensor:
        """One of our parameters, which has `shape` in the model, float32; the files may have fewer rows of a matrix."""
        slices = [self._homes[p.name].get_tensor(p.name).float() for p in self._parts(ours, config)]
        weight = torch.cat(slices) if len(slices) > 1 else slices[0]
        return weight.reshape(shape) if len(shape) == 3 else weight


class _Renamed:
    """One tensor of an open safetensors file, whatever name it is asked for by."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def get_slice(self, _: str) -> Any:
        return self._file.get_slice(self._name)

    def get_tensor(self, _: str) -> Any:
        return self._file.get_tensor(self._name)


def _name_of(ours: str, config: ModelConfig) -> str:
    return family_of(config).tensors(ours, config)[0].name


def weight_files(source: Path) -> list[Path]:
    """The safetensors files that hold the folder's weights: model.safetensors, else those that the index names, as
    transformers chooses. Raises UserError with the remedy."""
    index, single = source / INDEX, source / SINGLE
    if single.is_file():
        if index.is_file():
            log.warning("%s holds %s and %s: the first is read, as transformers reads it", source, SINGLE, INDEX)
        return [single]
    if not index.is_file():
        raise _no_weights(source)
    weight_map = read_json(index)[1].get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is not a safetensors file of its own folder")
        if not (source / name).is_file():
            raise UserError(
                f"{index} names {name}, which is missing",
                "The download is not complete, or the index belongs to other files: download the model again.",
            )
    return [source / name for name in names]


def _no_weights(source: Path) -> UserError:
    """What the folder has instead of safetensors, and what to do."""
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    if shards:
        return UserError(
            f"{source} has {shards[0]} but neither {SINGLE} nor {INDEX}", f"Download {INDEX} too: it names the files."
        )
    pickled = next((path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(source.glob(kind))), None)
    if pickled is not None:
        convert = f"AutoModelForCausalLM.from_pretrained({str(source)!r}).save_pretrained(OUT)"
        return UserError(
            f"{source} has its weights in {pickled}: a pickle, which can run code when it is opened",
            f"Convert it to safetensors where you trust it, with transformers: {convert}; copy its tokenizer's files.",
        )
    packed = next((path.name for path in sorted(source.glob("*.gguf"))), None)
    if packed is not None:
        return UserError(
            f"{source} has its weights in {packed}, which is rounded for llama.cpp",
            "Download the safetensors that it was made from.",
        )
    return UserError(f"{source} has no {SINGLE}", "Give the folder of a whole model, with config.json and safetensors.")


def _unreadable(path: Path, error: Exception) -> UserError:
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
    except OSError:
        pointer = False
    if pointer:
        return UserError(
            f"{path} is not a valid safetensors file but Git LFS's pointer to one", "Fetch it: git lfs pull"
        )
    return UserError(f"{path} is not a valid safetensors file: {error}")
