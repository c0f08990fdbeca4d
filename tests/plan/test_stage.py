"""The stage of a run that names none: the least sharing that fits, the same for training and for the estimate."""

from __future__ import annotations

from typing import Any

import pytest

from lumina.config import load
from lumina.config.deepspeed import resolve
from lumina.plan.costs.devices import Cluster, find_device
from lumina.plan.costs.memory import peak_memory
from lumina.plan.costs.setup import Data, read_setup
from lumina.plan.estimate import assumed_data, estimate_run
from lumina.plan.stage import ROOMY, default_document

FULL = Data(0, None, 1.0, 1.0, "")


def chosen(preset: str, world: int, memory: float) -> int:
    document: Any = default_document(load(preset), world, memory, bf16_supported=True)
    return int(document["zero_optimization"]["stage"])


@pytest.mark.parametrize(
    ("preset", "world", "memory", "stage"),
    [("medium", 8, 80e9, 1), ("1b", 2, 80e9, 1), ("3b", 8, 80e9, 1), ("3b", 2, 80e9, 3), ("8b", 8, 80e9, 3)],
)
def test_the_least_sharing_that_fits(preset: str, world: int, memory: float, stage: int) -> None:
    assert chosen(preset, world, memory) == stage
    config = load(preset)
    for less in range(1, stage + 1):
        document: Any = {"bf16": {"enabled": True}, "zero_optimization": {"stage": less}}
        resolved = resolve(config, world, "cuda", bf16_supported=True, document=document)
        needed = peak_memory(config, *read_setup(resolved.config, resolved.json, world, FULL), memory).device
        if less < stage:
            assert needed > ROOMY * memory
        elif less < 3:
            assert needed <= ROOMY * memory


def test_more_memory_never_shares_more() -> None:
    stages = [chosen("1b", 8, memory) for memory in range(10 * 10**9, 80 * 10**9, 10**9)]
    assert stages == sorted(stages, reverse=True)
    assert set(stages) == {1, 2, 3}


def test_where_nothing_is_chosen() -> None:
    assert default_document(load("nano"), 1, 80e9, bf16_supported=True) is None
    assert default_document(load("nano"), 8, None) is None  # a CPU
    assert default_document(load("nano", {"ds_config": "x.json"}), 8, 80e9) is None
    assert default_document(load("8b", {"lora_rank": 8}), 8, 80e9) is None


def test_the_estimate_assumes_what_training_takes() -> None:
    for preset, stage in (("1b", 1), ("8b", 3)):
        config = load(preset)
        run = estimate_run(config, Cluster(find_device("a100-80gb"), 1, 8), assumed_data(config, 1e9, None, 1.0))
        assert run.setup.stage == stage == chosen(preset, 8, 80e9)
        assert run.setup.overlap
