"""The memory model against what DeepSpeed really allocates, and activations against what autograd really keeps."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lumina.config import load
from lumina.plan.memory import Buffers, parameter_groups, peak_memory, states
from lumina.plan.workload import Shape

# Odd sizes, so that padding shows. persistence 100 keeps the norms whole under ZeRO 3.
SETS = ["hidden_size=72", "num_layers=3", "num_heads=6", "num_kv_heads=3", "intermediate_size=101", "vocab_size=257"]
PERSISTENCE = 100

CASES = [(stage, precision, tied) for stage in range(4) for precision, tied in (("bf16", True), ("fp32", False))]

# One process group per world size goes through all cases: starting DeepSpeed takes longer than the cases do.
# With a third argument the process is the first rank of that many, whose collectives do nothing.
PROBE = """
import importlib, json, os, sys
import deepspeed, torch
from lumina.config import ModelConfig
from lumina.model import Transformer
from lumina.train import engine
from lumina.train.optimizer import parameter_groups

def held(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())

def measure(stage, precision, tied):
    model = Transformer(ModelConfig(hidden_size=72, num_layers=3, num_heads=6, num_kv_heads=3, seq_length=16,
                                    intermediate_size=101, vocab_size=257, tie_word_embeddings=tied))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)
    zero = {"stage": stage, "reduce_bucket_size": 20000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 1000}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": precision == "bf16"}, "zero_optimization": zero,
              "zero_allow_untested_optimizer": True}
    made, wrapper, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(2):
        ids = torch.arange(16)[None]
        made.backward(made(ids, ids, targets_BS=ids, weights_BS=torch.ones(1, 16)))
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

if len(sys.argv) > 3:
    from torch.testing._internal.distributed.fake_pg import FakeStore
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": sys.argv[3]}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(sys.argv[3]))
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None  # as engine.join has it
else:
    engine.join()
found = [measure(*case) for case in json.loads(sys.argv[1])]
with open(f"{sys.argv[2]}.{torch.distributed.get_rank()}", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.parametrize("world", [1, 2, 4])
def test_states_are_deepspeeds_to_the_byte(tmp_path: Path, world: int) -> None:
    probe, out = tmp_path / "probe.py", tmp_path / "out"
    probe.write_text(PROBE, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    done = subprocess.run(
        [*launch, str(probe), json.dumps(CASES), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(world):
        expect_the_same(tmp_path / f"out.{rank}", world, f"rank {rank} of {world}")


def test_states_are_deepspeeds_to_the_byte_at_thousands_of_ranks(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE, encoding="utf-8")
    line = [sys.executable, str(probe), json.dumps(CASES), str(tmp_path / "out"), "4096"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expect_the_same(tmp_path / "out.0", 4096, "the first of 4096")


def expect_the_same(measured: Path, world: int, what: str) -> None:
    for (stage, precision, tied), real in zip(CASES, json.loads(measured.read_text(encoding="utf-8")), strict=True):
        config = load("nano", sets=[*SETS, f"tie_word_embeddings={tied}"]).model_copy(update={"vocab_size": 257})
        ours = states(config, Shape(1, 1, world, precision, stage), PERSISTENCE)
        expected = {"weights": ours.weights, "master": ours.master, "moments": ours.moments}
        assert real == expected, f"ZeRO {stage}, {precision}, {what}"


def test_tensors_are_the_models() -> None:
    import torch

    from lumina.model import Transformer
    from lumina.train.optimizer import parameter_groups as real_groups

    families = (["family=qwen2"], ["family=qwen3", "head_size=96"])
    for sets in ([], ["tie_word_embeddings=false"], *families):
        config = load("nano", sets=sets)
        with torch.device("meta"):
            model = Transformer(config)
        real = [[p.numel() for p in group["params"]] for group in real_groups(model, 0.1)]
        assert [sorted(group) for group in real] == [sorted(group) for group in parameter_groups(config)]


def test_more_ranks_never_need_more_each() -> None:
    config = load("large")
    for stage in (1, 2, 3):
        totals = [peak_memory(config, Shape(1, 2, world, "bf16", stage)).weights for world in (2, 8, 64, 1024)]
        assert totals == sorted(totals, reverse=stage == 3) or stage < 3
        optimizers = [states(config, Shape(1, 1, world, "bf16", stage)) for world in (1, 2, 8, 64, 1024)]
        assert [s.master for s in optimizers] == sorted((s.master for s in optimizers), reverse=True)


def test_offload_moves_bytes_to_the_host() -> None:
    config, buffers = load("medium"), Buffers()
    plain = Shape(2, 4, 8, "bf16", 3)
    on_device = peak_memory(config, plain, buffers)
    offloaded = peak_memory(config, replace(plain, offload_optimizer=True, offload_params=True), buffers)
    assert on_device.host == 0
    assert (offloaded.weights, offloaded.master, offloaded.moments) == (0, 0, 0)
    # weights, master, moments, and the float32 gradients that CPU Adam reads
    held = states(config, plain, buffers.persistence)
    assert offloaded.host == held.weights + 2 * held.master + held.moments
    assert offloaded.device < on_device.device
