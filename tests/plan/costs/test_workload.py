"""The plan's traffic against the collectives that DeepSpeed really calls under Lumina's default JSON.

A process stands for the first of four ranks, whose collectives do nothing but are counted."""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lumina.config import load
from lumina.plan.costs.setup import Setup
from lumina.plan.costs.workload import flops_per_token, layer_matrix_parameters

if TYPE_CHECKING:
    from tests.runs import Runs

WORLD = 4
LAYERS = 24  # many beside the table, as in a real model: stage 3 does not keep all of them gathered
ACCUMULATION = 2


def counted(stage: int) -> dict[str, float]:
    """Bytes that this rank receives in one optimizer step, of gradients and of weights; and what the plan says."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from lumina.config import deepspeed as ds_json
    from lumina.model import Transformer
    from lumina.plan.costs.setup import Data, read_setup
    from lumina.plan.costs.workload import traffic
    from lumina.train.deepspeed import Engine
    from tests.train.tiny_engines import batch, make_config

    received: Counter[str] = Counter()
    share = (WORLD - 1) / WORLD

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name()
            if name.startswith("c10d::"):
                first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
                pieces = first if isinstance(first, list) else [first]
                size = sum(piece.nbytes for piece in pieces)
                if size <= 64:  # a norm or a flag
                    pass
                elif "allreduce" in name:
                    received["gradients"] += 2 * share * size
                elif "reduce_scatter" in name:  # `first` is the share
                    received["gradients"] += (WORLD - 1) * size
                elif "gather" in name:  # `first` is the whole
                    received["weights"] += share * size
                else:
                    received[name] += size
            return func(*args, **(kwargs or {}))

    config = make_config(
        "bf16", batch_size=1, gradient_accumulation_steps=ACCUMULATION, vocab_size=512, num_layers=LAYERS
    )
    resolved = ds_json.resolve(config, WORLD, "cuda", bf16_supported=True, document=ds_json.default_json(WORLD, stage))
    made = Engine(Transformer(config), resolved.config, resolved.json)
    made.set_lr(1e-2)

    def step() -> None:
        for number in range(ACCUMULATION):
            made.accumulate(batch(number), 1 / 40, last=number == ACCUMULATION - 1)
        made.step()

    step()  # stage 3 records its order of modules
    step()
    received.clear()
    with Collectives():
        step()
    setup, _ = read_setup(resolved.config, resolved.json, WORLD, Data(1, None, 1.0, 1.0, ""))
    plan = traffic(config, setup)
    return {**received, "planned gradients": plan.gradients, "planned weights": plan.weights}


def _probe(rank: int, *, out: Path) -> None:
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", WORLD_SIZE=str(WORLD))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None  # as init_process_group has it
    out.write_text(json.dumps([counted(stage) for stage in range(4)]), encoding="utf-8")
    os._exit(0)


def test_what_is_planned_is_what_is_sent(runs: Runs, tmp_path: Path) -> None:
    job = runs.start([], patch=partial(_probe, out=tmp_path / "out"))
    assert job.wait() == [0], job.stderr()[-3000:]
    for stage, found in enumerate(json.loads((tmp_path / "out").read_text(encoding="utf-8"))):
        for kind in ("gradients", "weights"):
            planned = found[f"planned {kind}"]
            assert found.get(kind, 0.0) == pytest.approx(planned, rel=0.05), f"stage {stage}: {kind}"
        assert set(found) <= {"gradients", "weights", "planned gradients", "planned weights"}


def test_experts_cost_what_a_token_goes_through() -> None:
    """FLOPs count the active weights, every matrix once."""
    config = load("nano", sets=["family=qwen3_moe", "experts={count: 8, per_token: 3, size: 64, dense_layers: [1]}"])
    vectors = config.num_layers * (2 * config.hidden_size + 2 * config.head_dim) + config.hidden_size
    matrices = config.num_parameters(False, active=True) - vectors
    assert matrices < config.num_parameters(False) / 1.3
    assert config.num_layers * layer_matrix_parameters(config) == pytest.approx(matrices)
    assert flops_per_token(config, Setup(1, 1, 1, "bf16", 2)).layers == pytest.approx(2 * matrices)
