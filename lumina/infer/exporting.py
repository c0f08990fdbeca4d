"""`lumina export`: a run as a folder that transformers and vLLM load.

The folder appears whole or not at all. Weights go through one shard at a time, so a model larger than memory exports.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lumina.chat import Tokenizer, hf_files
from lumina.config import ModelConfig, UserError
from lumina.infer import hf_names, hf_tokenizer
from lumina.infer.loading import find_checkpoint, foreign_tokenizer, read_config, weights
from lumina.infer.voice import LuminaVoice
from lumina.train.checkpoint import read_progress

log = logging.getLogger("lumina")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its weight files, their bytes of weights, and the checkpoint they came from."""

    folder: Path
    shards: list[str]
    bytes: int
    checkpoint: Path


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000000. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?B?)\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise UserError(f"shard size {text} is not a size", "Give it as 5GB, 500MB or a number of bytes.")
    return size


def export(run: str | Path, out: str | Path, dtype: str = "float32", shard_size: str = "5GB") -> Exported:
    """Write the model that `run` means (see find_checkpoint) as a Hugging Face folder.

    Args:
        dtype: float32 (the stored master weights, exactly), bfloat16 or float16.
        shard_size: largest bytes of weights in a file; a single larger tensor gets a file of its own.

    Raises:
        UserError: no such run, `out` already holds something, a bad dtype or size.
    """
    out, limit = Path(out), parse_size(shard_size)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds something", "Choose another folder, or remove it first.")
    checkpoint = find_checkpoint(run)
    config = read_config(checkpoint)
    scratch = out.parent / f".{out.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        shards, total = _write_weights(scratch, checkpoint, config, DTYPES[dtype], limit)
        foreign = foreign_tokenizer(checkpoint)
        files = _description(config, dtype) if foreign is None else _foreign_description(config, dtype, foreign)
        for name, value in files.items():
            _write(scratch / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        for path in sorted(foreign.iterdir()) if foreign is not None else []:
            if path.name != hf_files.STOPS:
                shutil.copyfile(path, scratch / path.name)
        _write(scratch / "README.md", _card(checkpoint, config, dtype))
        if out.exists():
            out.rmdir()
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Exported(out, shards, total, checkpoint)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _foreign_description(config: ModelConfig, dtype: str, folder: Path) -> dict[str, Any]:
    """An imported model's config.json; its tokenizer's own files are copied beside it."""
    stops = sorted(hf_files.read_stops(folder))
    return {"config.json": hf_names.to_hf_config(config, dtype, stops if len(stops) > 1 else stops[0], None)}


def _description(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Every JSON file but the index of the weights."""
    tokenizer = Tokenizer.load()
    suppressed = LuminaVoice(tokenizer).forbidden(config.vocab_size).nonzero()[:, 0].tolist()
    generation = {
        "eos_token_id": tokenizer.stop_id,
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": suppressed,  # what Lumina never samples either
        "max_length": config.seq_length,
    }
    return {
        "config.json": hf_names.to_hf_config(config, dtype, tokenizer.stop_id, tokenizer.pad_id),
        "generation_config.json": generation,
        "tokenizer.json": hf_tokenizer.tokenizer_json(tokenizer),
        "tokenizer_config.json": hf_tokenizer.tokenizer_config(tokenizer, config.seq_length),
    }


def _plan(config: ModelConfig, itemsize: int, limit: int) -> list[list[str]]:
    """Our parameters dealt to shards in the model's order, each shard filled up to `limit` bytes."""
    from lumina.model import Transformer

    with torch.device("meta"):
        sizes = {name: p.numel() * itemsize for name, p in Transformer(config).named_parameters()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_weights(
    folder: Path, checkpoint: Path, config: ModelConfig, dtype: torch.dtype, limit: int
) -> tuple[list[str], int]:
    """Returns the names of the files and the bytes of weights in them."""
    plan = _plan(config, dtype.itemsize, limit)
    count = len(plan)
    names = [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for i in range(count)
    ]
    stream, total = weights(checkpoint, config), 0
    homes: dict[str, str] = {}
    for file, members in zip(names, plan, strict=True):
        tensors = dict(_renamed(stream, members, config, dtype))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        homes |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    next(stream, None)  # lets it close its files
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
        _write(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return names, total


def _renamed(
    stream: Iterator[tuple[str, torch.Tensor]], members: list[str], config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for expected in members:
        ours, weight = next(stream)
        assert ours == expected, "the plan and the checkpoint go through the model in the same order"
        for theirs, tensor in hf_names.split(ours, weight, config):
            yield theirs, tensor.to(dtype).contiguous()


def _card(checkpoint: Path, config: ModelConfig, dtype: str) -> str:
    """The model card: what is known about the run, and nothing else."""
    progress, _ = read_progress(checkpoint)
    facts = {
        "Run": checkpoint.parent.parent.name,
        "Checkpoint": checkpoint.name,
        "Optimizer steps": progress.step,
        "Parameters": f"{config.num_parameters():,}",
        "Without embeddings": f"{config.num_parameters(with_embeddings=False):,}",
        "Window": f"{config.seq_length} tokens",
        "Weights": dtype,
    }
    if progress.best_loss is not None and progress.best_step == progress.step:
        facts["Evaluation loss"] = f"{progress.best_loss:.4f} nats per supervised token"
    if progress.precision:
        facts["Trained in"] = f"{progress.precision}, ZeRO-{progress.zero_stage}, world size {progress.world}"
    if progress.global_batch_size:
        facts["Global batch"] = f"{progress.global_batch_size} samples"
    if progress.data_fingerprint:
        facts["Training data"] = f"fingerprint {progress.data_fingerprint}"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    name = checkpoint.parent.parent.name
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A chat model trained with Lumina. Llama architecture, cl100k_base vocabulary with control tokens above it.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
chat = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

Lumina's own commands never read control tokens out of text that a user typed. transformers does: remove
`<|im_start|>` and its like from untrusted messages before `apply_chat_template`.
"""
