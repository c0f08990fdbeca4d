"""Engines that train adapters: under every stage the weights under them have no state and do not move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lumina import checkpoint
from lumina.checkpoint import TrainerState
from lumina.model import lora
from lumina.train.deepspeed import Engine, LayerStats
from lumina.train.deepspeed.layers import layer_of
from lumina.train.saving import snapshot
from tests.train.tiny_engines import EVERY, batch, make_engine, same_state, save, state_of, train_step

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

SETTINGS: dict[str, Any] = {"lora_rank": 3, "lora_targets": ["q_proj", "v_proj", "o_proj", "up_proj"]}


def frozen(made: Engine) -> dict[str, torch.Tensor]:
    """The weights under the adapters as this rank keeps them (world 1: whole)."""
    found = {name: p for name, p in made.model.named_parameters() if not p.requires_grad}
    return {name: getattr(p, "ds_tensor", p).detach().clone().flatten() for name, p in found.items()}


@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_only_adapters_move_and_are_saved(stage: int, precision: str, tmp_path: Path) -> None:
    made = make_engine(stage, precision, **SETTINGS)
    before, begun = frozen(made), state_of(made)
    losses = [train_step(made, 0)[0] for _ in range(12)]
    assert losses[-1] < 0.98 * losses[0]
    after = frozen(made)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    expected = lora.shapes(made.model.config, made.model.config)  # type: ignore[arg-type]
    state = state_of(made)
    kinds = ("master", "exp_avg", "exp_avg_sq")
    assert state.keys() == {f"{kind}/{name}" for kind in kinds for name in expected}
    assert sum(value.numel() for owner in made.optimizer.state.values() for value in owner.values() if value.dim()) <= (
        2 * (sum(rows * columns for rows, columns in expected.values()) + 64)  # stage 3 rounds up
    ), "something else has optimizer state"
    assert all(not torch.equal(state[key], begun[key]) for key in begun if key.startswith("master"))

    path = save(tmp_path, made, TrainerState(step=12))
    fresh = make_engine(stage, precision, seed=0, **SETTINGS)
    snapshot.load_checkpoint(path, fresh, checkpoint.read_trainer_state(path)[1])
    assert same_state(state_of(fresh), state)
    assert train_step(made, 5) == train_step(fresh, 5)
    assert same_state(state_of(fresh), state_of(made))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_trains_the_same_adapters(precision: str) -> None:
    ends = []
    for stage in (0, 1, 2, 3):
        made = make_engine(stage, precision, **SETTINGS)
        figures = [train_step(made, seed) for seed in range(3)]
        ends.append((state_of(made), figures))
    for state, figures in ends[1:]:
        for (loss, norm, applied), (expected, expected_norm, _) in zip(figures, ends[0][1], strict=True):
            assert applied
            assert (loss, norm) == pytest.approx((expected, expected_norm), rel=1e-5 if precision == "fp32" else 3e-2)
        if precision == "fp32":
            for name, value in state.items():
                torch.testing.assert_close(value, ends[0][0][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_layers_without_adapters_are_no_dead_layers(stage: int) -> None:
    made = make_engine(stage, **SETTINGS)
    stats = LayerStats(made)
    for _ in range(2):
        made.accumulate(batch(1), 1 / 20, last=True)
        stats.before()
        norm, applied = made.step()
        figures = stats.after()
    assert applied
    assert figures.keys() == {layer_of(name) for name in lora.shapes(made.model.config, made.model.config)}  # type: ignore[arg-type]
    assert sum(one.gradient**2 for one in figures.values()) ** 0.5 == pytest.approx(float(norm), rel=1e-3)
