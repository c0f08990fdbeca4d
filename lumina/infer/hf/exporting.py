"""`lumina export`: a run as a folder that transformers and vLLM load, or as plain safetensors.

The folder appears whole or not at all. Weights go through one shard at a time, so a model larger than memory exports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lumina.chat import ChatTokenizer
from lumina.config import ModelConfig, UserError
from lumina.files import atomic_folder, write_text
from lumina.infer.hf.description import describe, write_described
from lumina.infer.hf.gguf_file import DTYPES as GGUF_DTYPES
from lumina.infer.hf.gguf_file import write_gguf
from lumina.infer.hf.paths import check_new_folder, parse_size
from lumina.infer.hf.peft import TOKENIZER_USAGE, write_adapter
from lumina.infer.hf.peft import USAGE as PEFT_USAGE
from lumina.infer.hf.safetensors_file import write_safetensors
from lumina.infer.loading import (
    check_size,
    find_checkpoint,
    fitting_tokenizer,
    read_config,
    trainer_state_of,
    weights,
)
from lumina.model.families import family_of

log = logging.getLogger("lumina")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


FORMS = ("hf", "safetensors", "peft", "gguf")

# One of our parameters as (name, tensor) pairs of the files'.
Rename = Callable[[str, torch.Tensor, ModelConfig], Iterable[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its weight files, their bytes of weights, and the checkpoint they came from."""

    folder: Path
    shards: list[str]
    bytes: int
    checkpoint: Path


def export(
    run: str | Path, out: str | Path, dtype: str = "float32", shard_size: str = "5GB", form: str = "hf"
) -> Exported:
    """Write the model that `run` means (see find_checkpoint) as a folder of safetensors and what describes them.

    Args:
        form: hf, as transformers and vLLM read it, with tokenizer and chat template; safetensors, the weights under
            Lumina's own names and in its own shapes, with the model's settings in lumina.json; peft, the adapters
            alone, as that library loads them over an export of the run that they were trained over; or gguf, one file
            for llama.cpp and its like.
        dtype: float32 (the stored master weights, exactly), bfloat16 or float16; for gguf float32, float16 or q8_0.
        shard_size: largest bytes of weights in a file; a single larger tensor gets a file of its own.

    Raises:
        UserError: no such run, `out` already holds something, a bad dtype or size, or peft without adapters, or with
            a model that the base's export would not be.
    """
    out, limit = Path(out), parse_size(shard_size)
    if dtype not in DTYPES and not (form == "gguf" and dtype in GGUF_DTYPES):
        raise UserError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    if form not in FORMS:
        raise UserError(f"format {form} is not one of {', '.join(FORMS)}")
    check_new_folder(out)
    checkpoint = find_checkpoint(run)
    config = read_config(checkpoint)
    check_size(checkpoint, config)
    tokenizer = fitting_tokenizer(checkpoint, config)  # one that does not fit is found before anything is written
    with atomic_folder(out) as scratch:
        if form == "peft":
            shards, total = write_adapter(scratch, checkpoint, config, tokenizer, DTYPES[dtype])
        elif form == "gguf":
            named = checkpoint.parent.parent.name
            shards, total = write_gguf(scratch, checkpoint, config, dtype, tokenizer, named)
        else:
            rename = family_of(config).split if form == "hf" else _own_names
            shards, total = _write_weights(scratch, checkpoint, config, DTYPES[dtype], limit, rename)
        if form == "hf":
            describe(scratch, config, dtype, tokenizer)
        elif form == "safetensors":
            write_described(scratch / "lumina.json", config.model_dump())
        more = TOKENIZER_USAGE if form == "peft" and (scratch / "tokenizer.json").exists() else ""
        write_text(scratch / "README.md", _card(checkpoint, config, dtype, form, tokenizer) + more)
    return Exported(out, shards, total, checkpoint)


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
    folder: Path, checkpoint: Path, config: ModelConfig, dtype: torch.dtype, limit: int, rename: Rename
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
        tensors = dict(_renamed(stream, members, config, dtype, rename))
        write_safetensors(folder / file, tensors)
        homes |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    next(stream, None)  # lets it close its files
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
        write_described(folder / "model.safetensors.index.json", index)
    return names, total


def _own_names(ours: str, weight: torch.Tensor, config: ModelConfig) -> Iterable[tuple[str, torch.Tensor]]:
    return [(ours, weight)]


def _renamed(
    stream: Iterator[tuple[str, torch.Tensor]],
    members: list[str],
    config: ModelConfig,
    dtype: torch.dtype,
    rename: Rename,
) -> Iterator[tuple[str, torch.Tensor]]:
    for expected in members:
        ours, weight = next(stream)
        assert ours == expected, "the plan and the checkpoint go through the model in the same order"
        for theirs, tensor in rename(ours, weight, config):
            yield theirs, tensor.to(dtype).contiguous()


def _card(checkpoint: Path, config: ModelConfig, dtype: str, form: str, tokenizer: ChatTokenizer) -> str:
    """The model card: what is known about the run, and nothing else."""
    state = trainer_state_of(checkpoint)
    name = checkpoint.parent.parent.name
    facts = {
        "Run": name,
        "Checkpoint": checkpoint.name,
        "Optimizer steps": state.step,
        "Architecture": config.family,
        "Parameters": f"{config.num_parameters():,}",
        "Without embeddings": f"{config.num_parameters(with_embeddings=False):,}",
        "Context length": f"{config.seq_length} tokens",
        "Weights": dtype,
    }
    if state.best_loss is not None and state.best_step == state.step:
        facts["Evaluation loss"] = f"{state.best_loss:.4f} nats per supervised token"
    if state.lora:
        facts["Adapters"] = f"rank {state.lora['lora_rank']} over {Path(state.base['checkpoint']).parts[-3]}"
        facts["Adapters are"] = "these files" if form == "peft" else "merged"
    if state.precision:
        facts["Trained in"] = f"{state.precision}, ZeRO-{state.zero_stage}, world size {state.world}"
    if state.global_batch_size:
        facts["Global batch"] = f"{state.global_batch_size} samples"
    if state.data_fingerprint:
        facts["Training data"] = f"fingerprint {state.data_fingerprint}"
    if tokenizer.chat_template is not None:
        facts["Chat template"] = tokenizer.chat_template
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    whose = "cl100k_base vocabulary with special tokens above it" if tokenizer.folder is None else "its own vocabulary"
    usage = {"hf": _HF_USAGE, "safetensors": _OWN_USAGE, "peft": PEFT_USAGE, "gguf": _GGUF_USAGE}[form]
    library = {"hf": "transformers", "safetensors": "lumina", "peft": "peft", "gguf": "gguf"}[form]
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n---\n\n"
        f"# {name}\n\nA chat model trained with Lumina, {whose}.\n\n| | |\n|---|---|\n{table}\n\n{usage}"
    )


_HF_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
chat = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

Lumina's own commands never read special tokens out of text that a user typed. transformers does: remove
`<|im_start|>` and its like from untrusted messages before `apply_chat_template`.
"""
_GGUF_USAGE = """```bash
llama-cli -m model-F16.gguf --jinja
```
"""
_OWN_USAGE = """The weights have Lumina's own names and shapes: `blocks.N.attention.qkv` is queries, keys and values one
on top of the other, `feed_forward.gate_up` gate and up; a tied output layer is not there a second time. `lumina.json`
holds the model's settings.

```python
import json

import torch
from lumina.config import ModelConfig
from lumina.model import Transformer
from safetensors.torch import load_file

model = Transformer(ModelConfig(**json.load(open("lumina.json"))))
model.load_state_dict(load_file("model.safetensors"), strict=False)  # strict=False: a tied output layer
logits = model(torch.tensor([[1, 2, 3]]), torch.arange(3)[None])
```
"""
