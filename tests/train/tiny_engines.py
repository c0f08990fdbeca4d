"""DeepSpeed engines of a few thousand parameters, world 1, several in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from lumina.checkpoint import MASTER, Retention, SaveError, SaveJob, Saver, SaveTarget, TrainerState
from lumina.config import Config
from lumina.config import deepspeed as ds_json
from lumina.data import Batch, TorchBatch
from lumina.model import Transformer, float8, lora
from lumina.train.deepspeed import Engine, moments, owned_fragments, partitioned_init, startup
from lumina.train.saving.snapshot import take_snapshot

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "seq_length": 64,
    "vocab_size": VOCABULARY,
}
EVERY = [(stage, precision) for precision in ("fp32", "bf16", "fp16") for stage in (0, 1, 2, 3)]


def make_config(precision: str = "fp32", **changes: Any) -> Config:
    values = {"batch_size": 1, "gradient_accumulation_steps": 1, "weight_decay": 0.1, "init_std": 0.2}
    return Config.create(SHAPE | values | {"precision": precision} | changes, frozenset())


@contextmanager
def fp16_on_a_cpu() -> Iterator[None]:
    """DeepSpeed refuses float16 where its accelerator says that it has none; torch computes it on a CPU too."""
    from deepspeed.accelerator import get_accelerator

    accelerator, dtypes = get_accelerator(), [torch.float32, torch.bfloat16, torch.float16]
    with (
        patch.object(accelerator, "is_fp16_supported", lambda: True),
        patch.object(accelerator, "supported_dtypes", lambda: dtypes),
    ):
        yield


def make_engine(
    stage: int, precision: str = "fp32", seed: int = 0, json: dict[str, dict[str, Any]] | None = None, **changes: Any
) -> Engine:
    """An engine with freshly drawn weights, at learning rate 1e-2. `json`: keys for blocks of the DeepSpeed JSON."""
    startup.init_process_group()
    config = make_config(precision, **changes)
    document = ds_json.default_json(1)
    document["zero_optimization"]["stage"] = stage
    for block, keys in (json or {}).items():
        document[block] = {**document.get(block, {}), **keys}
    resolved = ds_json.resolve(config, 1, "cuda", bf16_supported=True, document=document)  # a CPU's fp16 is refused
    torch.manual_seed(seed)
    with fp16_on_a_cpu():
        with partitioned_init.partition_on_init(resolved.json):
            model = Transformer(config)
            if config.lora_rank:
                lora.attach(model, config)
            if config.float8 is not None:
                float8.convert(model, config.float8)
        made = Engine(model, resolved.config, resolved.json)
    made.set_lr(1e-2)
    return made


def arrays(seed: int, length: int = 40, bad: bool = False) -> Batch:
    """Two random documents; `bad`: one weight is NaN, and so every gradient is."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(VOCABULARY, size=length)
    weights = (draw.random(length) < 0.5).astype(np.float32)
    first = length // 3
    weights[[first - 1, length - 1]] = 0.0
    weights[0] = np.nan if bad else 1.0
    positions = np.concatenate([np.arange(first), np.arange(length - first)])
    edges = np.array([0, first, length], dtype=np.int32)
    return Batch(ids, np.roll(ids, -1), weights, positions, edges, length - first)


def batch(seed: int, length: int = 40, bad: bool = False) -> TorchBatch:
    """`arrays` as the engine takes them."""
    return arrays(seed, length, bad).torch()


def whole(of: Batch) -> tuple[Any, ...]:
    """A batch as the model's first arguments: every position has its target and weight, nothing is filled up."""
    ids, positions, edges, targets, weights = (
        torch.from_numpy(a) for a in (of.ids_T, of.positions_T, of.cu_seqlens_D, of.targets_T, of.weights_T)
    )
    return ids[None], positions[None], edges, of.max_seqlen, targets[None], weights[None]


def train_step(made: Engine, seed: int, bad: bool = False, limit: float = math.inf) -> tuple[float, float, bool]:
    """(loss per supervised token, gradient norm, applied) of one optimizer step of two micro-batches."""
    loss = torch.zeros(())
    for number in range(2):
        loss += made.accumulate(batch(2 * seed + number, bad=bad and number == 0), 1 / 40, last=number == 1)[0]
    norm, applied = made.step(limit)
    return float(loss), float(norm), bool(applied)


def state_of(made: Engine) -> dict[str, Tensor]:
    """Copies of every weight and moment by key and parameter, flat and whole (world 1: a rank holds everything)."""
    found = {}
    for piece in owned_fragments(made):
        for key, value in {MASTER: piece.view(piece.owner), **moments(made, piece)}.items():
            found[f"{key}/{piece.name}"] = value.detach().float().clone()
    return found


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save(folder: Path, made: Engine, progress: TrainerState) -> Path:
    """Write a checkpoint of a world of one and wait for it; raises what made it fail."""
    saver = Saver(0, 1, "test", timeout=60)
    saver.begin(SaveJob(take_snapshot(made, progress), [SaveTarget("checkpoint", folder, Retention(100))]))
    assert saver.wait()
    (outcome,) = saver.outcomes()
    if outcome.path is None:
        raise SaveError(outcome.error, outcome.retry)
    return outcome.path
