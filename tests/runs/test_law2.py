"""Law 1: the samples of a step are the same for every world size and micro-batch. Law 2: so is its gradient.

Adam's first update barely sees the gradient's scale, so the weights alone would hide a wrong division. The first
moment, which is (1 - beta1) times the gradient when nothing is clipped, is held to the reference too.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.runs as real
from lumina.chat import Tokenizer
from lumina.config import load
from lumina.data import Batch, GlobalOrder, Loader, PackedDataset, prepare
from tests.runs import Runs, State, arguments, final, losses
from tests.train.tiny_engines import VOCABULARY, make_engine

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

# 23 conversations, all in one global batch, packed or not; no world size or micro-batch here divides 23.
SAMPLES = 23
# In the whole vocabulary: among a few weights, a gradient so near zero that Adam's first update is rounding shows.
ONE_STEP: dict[str, Any] = {
    "whole_vocabulary": True,
    "precision": "fp32",
    "max_steps": 1,
    "global_batch_size": 64,
    "seq_length": 128,
    "max_grad_norm": 0.0,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real.write_conversations(tmp_path_factory.mktemp("few") / "few.jsonl", SAMPLES, seed=5, turns=2)


@pytest.fixture(scope="module")
def reference(runs: Runs, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[State, float]]:
    """One conversation at a time on one process: no packing, no padding, no sum over ranks."""
    run = tmp_path_factory.mktemp("reference") / "run"
    runs.train(arguments(run, few, packing=False, batch_size=1, **ONE_STEP))
    (record,) = real.steps(run)
    assert record["batches"] == 1
    yield final(run, 1), record["loss"]
    shutil.rmtree(run)


def relative(one: State, other: State, kind: str) -> dict[str, float]:
    """Norm of the difference over the norm, by parameter."""
    names = [name for found, name in one if found == kind]
    norm = lambda tensor: float(tensor.double().norm())
    return {n: norm(one[kind, n].double() - other[kind, n].double()) / norm(other[kind, n]) for n in names}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("world", "stage", "micro"),
    [
        (1, 0, 1),
        (1, 0, 2),
        (1, 0, 4),
        (2, 2, 1),
        (2, 2, 2),
        (2, 2, 4),
        pytest.param(2, 3, 2, marks=pytest.mark.long),
        pytest.param(3, 0, 2, marks=pytest.mark.long),
    ],
)
def test_one_step_does_not_depend_on_how_it_is_cut(
    world: int,
    stage: int,
    micro: int,
    packing: bool,
    runs: Runs,
    few: Path,
    reference: tuple[State, float],
    place: Path,
) -> None:
    run = place / "run"
    runs.train(arguments(run, few, stage=stage, packing=packing, batch_size=micro, **ONE_STEP), world)
    expected, loss = reference
    found = final(run, 1)
    assert losses(run) == pytest.approx([loss], rel=1e-6)
    assert max(relative(found, expected, "master").values()) <= 1e-6
    assert max(relative(found, expected, "exp_avg").values()) <= 1e-5


def test_the_batch_holds_the_same_conversations_packed_and_not(few: Path, tmp_path: Path) -> None:
    """What the tests above rest on, and that packing does pack."""
    packed, single = (dataset(few, tmp_path, packing) for packing in (True, False))
    assert single.num_samples == SAMPLES
    assert packed.num_samples < SAMPLES / 2
    assert documents(packed.batch(range(packed.num_samples))) == documents(single.batch(range(SAMPLES)))


def dataset(path: Path, cache: Path, packing: bool) -> PackedDataset:
    values = {"packing": packing, "seq_length": ONE_STEP["seq_length"], "num_workers": 1, "cache_dir": str(cache)}
    return prepare([path], load("nano", values), Tokenizer.load())


# --- fp16 ---


@pytest.fixture(scope="module")
def float32_norms() -> list[float]:
    return gradient_norms(0, "fp32", 1)


def gradient_norms(stage: int, precision: str, micro: int) -> list[float]:
    """Of steps 1 and 2 of one engine, on the same four samples a step cut into micro-batches of `micro`."""
    made = make_engine(stage, precision, init_std=0.05)
    made.set_lr(1e-3)
    norms = []
    for step in range(2):
        samples = [sample(4 * step + number) for number in range(4)]
        weight = float(sum(one.weights_T.sum() for one in samples))
        groups = [samples[low : low + micro] for low in range(0, 4, micro)]
        for number, group in enumerate(groups, 1):
            made.accumulate(join(group).torch(), 1 / weight, last=number == len(groups))
        norm, applied = made.step()
        assert applied
        norms.append(float(norm))
    return norms


def sample(seed: int) -> Batch:
    """One document of random tokens, of a length of its own."""
    draw = np.random.default_rng(seed)
    length = int(draw.integers(9, 33))
    ids, weights = draw.integers(VOCABULARY, size=length), (draw.random(length) < 0.5).astype(np.float32)
    weights[0] = 1.0
    return Batch(ids, np.roll(ids, -1), weights, np.arange(length), np.array([0, length], dtype=np.int32), length)


def join(samples: list[Batch]) -> Batch:
    fields = ("ids_T", "targets_T", "weights_T", "positions_T")
    ids, targets, weights, positions = (np.concatenate([getattr(one, name) for one in samples]) for name in fields)
    edges = np.cumsum([0, *(len(one.ids_T) for one in samples)]).astype(np.int32)
    return Batch(ids, targets, weights, positions, edges, max(one.max_seqlen for one in samples))


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_norms_in_fp16(stage: int, micro: int, float32_norms: list[float]) -> None:
    """The loss scale is in no norm, whatever the stage and however the step is cut: DeepSpeed's engine scales the loss
    under ZeRO alone, while its half-precision wrapper of stage 0 divides by the scale all the same."""
    assert gradient_norms(stage, "fp16", micro) == pytest.approx(float32_norms, rel=1e-3)


def _allow_fp16(rank: int) -> None:
    """In a rank's process: fp16 on this CPU."""
    from deepspeed.accelerator import get_accelerator

    from lumina.config import precision

    accelerator, dtypes = get_accelerator(), [torch.float32, torch.bfloat16, torch.float16]
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: dtypes
    resolve = precision.resolve
    precision.resolve = lambda wanted, device, **rest: "fp16" if wanted == "fp16" else resolve(wanted, device, **rest)


@pytest.mark.parametrize(
    ("world", "stage"), [(2, 0), *(pytest.param(2, stage, marks=pytest.mark.long) for stage in (1, 2, 3))]
)
def test_a_step_of_ranks_in_fp16(
    world: int, stage: int, runs: Runs, few: Path, reference: tuple[State, float], place: Path
) -> None:
    """Through a whole run: Adam's first moment, a tenth of the gradient, is float32's but for fp16's rounding."""
    run = place / "run"
    settings = {**ONE_STEP, "precision": "fp16", "batch_size": 4}
    job = runs.start(arguments(run, few, stage=stage, **settings), world, _allow_fp16)
    assert job.wait() == [0] * world, job.stderr()
    expected, loss = reference
    assert losses(run) == pytest.approx([loss], rel=1e-3)
    assert max(relative(final(run, 1), expected, "exp_avg").values()) <= 5e-3


Documents = Counter[tuple[tuple[int, ...], tuple[float, ...]]]


def documents(batch: Batch) -> Documents:
    """The documents of a batch as (ids, weights), padding left out."""
    found: Documents = Counter()
    for low, high in zip(batch.cu_seqlens_D[:-1], batch.cu_seqlens_D[1:], strict=True):
        if batch.weights_T[low:high].any():
            found[tuple(batch.ids_T[low:high].tolist()), tuple(batch.weights_T[low:high].tolist())] += 1
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_samples_of_a_step_do_not_depend_on_world_size_or_micro_batch(packing: bool, few: Path, tmp_path: Path) -> None:
    data = dataset(few, tmp_path, packing)
    order = GlobalOrder(data.num_samples, 5, 1234, data.fingerprint)
    steps = 2 * order.steps_per_epoch + 1
    expected = [documents(data.batch(order.indices(step))) for step in range(steps)]
    assert len({frozenset(step.items()) for step in expected}) == steps, "every step would be the same"
    for world, micro in [(1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (7, 1)]:
        ranks = [
            Loader(data, order, rank=rank, world=world, micro_batch_size=micro, start_step=0, stop_step=steps)
            for rank in range(world)
        ]
        for step, shares in enumerate(zip(*ranks, strict=True)):
            assert len({len(share.micro_batches) for share in shares}) == 1, "ranks would wait for each other for ever"
            trained = sum((documents(batch) for share in shares for batch in share.micro_batches), Documents())
            assert trained == expected[step]
            weight = sum(float(batch.weights_T.sum()) for share in shares for batch in share.micro_batches)
            assert {share.supervised_tokens for share in shares} == {weight}
