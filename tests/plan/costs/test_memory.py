"""The memory model against what DeepSpeed really allocates, and activations against what autograd really keeps."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lumina.config import load
from lumina.plan.costs.memory import parameter_groups, peak_memory, states
from lumina.plan.costs.setup import Buffers, Setup

if TYPE_CHECKING:
    from tests.runs import Runs

# Odd sizes, so that padding shows. persistence 100 keeps the norms whole under ZeRO 3.
SETS = ["hidden_size=72", "num_layers=3", "num_heads=6", "num_kv_heads=3", "intermediate_size=101", "vocab_size=257"]
PERSISTENCE = 100

CASES = [(stage, precision, tied) for stage in range(4) for precision, tied in (("bf16", True), ("fp32", False))]


def held(tensors: Iterable[Any]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def allocated(stage: int, precision: str, tied: bool) -> dict[str, int]:
    """What DeepSpeed holds after two steps, in bytes, by kind."""
    import deepspeed
    import torch

    from lumina.config import ModelConfig
    from lumina.model import Transformer
    from lumina.train.deepspeed import parameter_groups

    setup = {"hidden_size": 72, "num_layers": 3, "num_heads": 6, "num_kv_heads": 3, "intermediate_size": 101}
    model = Transformer(ModelConfig(**setup, seq_length=16, vocab_size=257, tie_word_embeddings=tied))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)
    zero: dict[str, int] = {"stage": stage, "reduce_bucket_size": 20000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": PERSISTENCE, "stage3_prefetch_bucket_size": 1000}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": precision == "bf16"}, "zero_optimization": zero}
    config |= {"zero_allow_untested_optimizer": True}
    made, wrapper, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(2):
        ids = torch.arange(16)[None]
        made.backward(made(ids, ids, targets_N=ids, weights_N=torch.ones(1, 16)))
        made.step()
    parameters = list(made.module.parameters())
    weights = [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    basic = made.basic_optimizer
    moments = [t for state in basic.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    own = {p.untyped_storage().data_ptr() for p in parameters if p.numel()}
    stepped = [p for group in basic.param_groups for p in group["params"]]
    masters = [p for p in stepped if p.untyped_storage().data_ptr() not in own]
    if stage == 3:
        masters = wrapper.fp32_partitioned_groups_flat
    return {"weights": held(weights), "master": held(masters), "moments": held(moments)}


def _probe(rank: int, *, out: Path, pretended: int = 0) -> None:
    """A rank's process, which goes through all cases; with `pretended`, it is the first of so many ranks, whose
    collectives do nothing."""
    import torch

    from lumina.train.deepspeed import startup

    if pretended:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        os.environ.update(RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", WORLD_SIZE=str(pretended))
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=pretended)
        backend = importlib.import_module("deepspeed.comm.torch")
        vars(backend)["build_shm_op"] = lambda: None  # as init_process_group has it
    else:
        startup.init_process_group()
    found = [allocated(*case) for case in CASES]
    out.with_suffix(f".{rank}").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_states_are_deepspeeds_to_the_byte(runs: Runs, tmp_path: Path, world: int) -> None:
    job = runs.start([], world, patch=partial(_probe, out=tmp_path / "out"))
    assert job.wait() == [0] * world, job.stderr()[-3000:]
    for rank in range(world):
        expect_the_same(tmp_path / f"out.{rank}", world, f"rank {rank} of {world}")


def test_states_are_deepspeeds_to_the_byte_at_thousands_of_ranks(runs: Runs, tmp_path: Path) -> None:
    job = runs.start([], patch=partial(_probe, out=tmp_path / "out", pretended=4096))
    assert job.wait() == [0], job.stderr()[-3000:]
    expect_the_same(tmp_path / "out.0", 4096, "the first of 4096")


def expect_the_same(measured: Path, world: int, what: str) -> None:
    for (stage, precision, tied), real in zip(CASES, json.loads(measured.read_text(encoding="utf-8")), strict=True):
        config = load("nano", sets=[*SETS, f"tie_word_embeddings={tied}"]).model_copy(update={"vocab_size": 257})
        ours = states(config, Setup(1, 1, world, precision, stage), PERSISTENCE)
        expected = {"weights": ours.weights, "master": ours.master, "moments": ours.moments}
        assert real == expected, f"ZeRO {stage}, {precision}, {what}"


def test_tensors_are_the_models() -> None:
    import torch

    from lumina.model import Transformer
    from lumina.train.deepspeed import parameter_groups as real_groups

    experts = "experts={count: 8, per_token: 2, size: 64, dense_layers: [1]}"
    families = (["family=qwen2"], ["family=qwen3", "head_size=96"], ["family=qwen3_moe", experts])
    families += (["family=olmoe", "experts={count: 4, per_token: 2}"],)
    for sets in ([], ["tie_word_embeddings=false"], *families):
        config = load("nano", sets=sets)
        with torch.device("meta"):
            model = Transformer(config)
        real = [[p.numel() for p in group["params"]] for group in real_groups(model, 0.1)]
        assert [sorted(group) for group in real] == [sorted(group) for group in parameter_groups(config)]


def test_more_ranks_never_need_more_each() -> None:
    config = load("large")
    for stage in (1, 2, 3):
        totals = [peak_memory(config, Setup(1, 2, world, "bf16", stage)).weights for world in (2, 8, 64, 1024)]
        assert totals == sorted(totals, reverse=stage == 3) or stage < 3
        optimizers = [states(config, Setup(1, 1, world, "bf16", stage)) for world in (1, 2, 8, 64, 1024)]
        assert [s.master for s in optimizers] == sorted((s.master for s in optimizers), reverse=True)


@pytest.mark.parametrize(("layers", "every", "there"), [(8, 1, 2), (8, 8, 1), (7, 3, 2)])
def test_inputs_on_their_way_to_the_host_are_still_on_the_device(layers: int, every: int, there: int) -> None:
    """At the end of a forward pass, where the output layer is the highest moment: two, where so many are recomputed."""
    from lumina.model.memory import offload
    from lumina.plan.costs import activations

    assert activations.UNDER_WAY == offload.UNDER_WAY
    config = load("nano", {"num_layers": layers, "hidden_size": 64, "vocab_size": 150_000, "intermediate_size": 64})
    setup = Setup(1, 1, 1, "bf16", checkpoint_every=every)
    kept, moved = (peak_memory(config, replace(setup, activation_offloading=on)) for on in (False, True))
    assert kept.moment == moved.moment == "output layer"
    recomputed = -(-layers // every)
    assert kept.activations - moved.activations == (recomputed - there) * 2 * 64 * setup.tokens(config)


def test_offload_moves_bytes_to_the_host() -> None:
    config, buffers = load("medium"), Buffers()
    plain = Setup(2, 4, 8, "bf16", 3)
    on_device = peak_memory(config, plain, buffers)
    offloaded = peak_memory(config, replace(plain, offload_optimizer=True, offload_params=True), buffers)
    assert on_device.host == 0
    assert (offloaded.weights, offloaded.master, offloaded.moments) == (0, 0, 0)
    # weights, master, moments, and the float32 gradients that CPU Adam reads
    held = states(config, plain, buffers.persistence)
    assert offloaded.host == held.weights + 2 * held.master + held.moments
    assert offloaded.device < on_device.device
