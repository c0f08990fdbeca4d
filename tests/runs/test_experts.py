"""Mixtures of experts in whole runs: the same losses on any number of ranks (laws 1 and 2), the same bits after a kill
(law 6), and resized."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Runs, arguments, differing, final, held_at, losses, steps

pytestmark = pytest.mark.timeout(900)

STEPS = 8
SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "seq_length": 32,
    "batch_size": 1,
    "global_batch_size": 6,
    "learning_rate": 1e-3,
    "max_steps": STEPS,
    "save_every_n_batches": 2,
    "init_std": 0.1,
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.01,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral", "experts": "{count: 4, per_token: 2}", "intermediate_size": 48},
    "qwen3_moe": {
        "family": "qwen3_moe",
        "num_layers": 3,
        "experts": "{count: 8, per_token: 3, size: 16, norm_topk_prob: true, dense_layers: [1]}",
        "intermediate_size": 48,
        "gradient_checkpointing": 2,
    },
}
CASES = [
    pytest.param("mixtral", 3, marks=pytest.mark.long),
    pytest.param("mixtral", 2, marks=pytest.mark.long),
    pytest.param("qwen3_moe", 2, marks=pytest.mark.long),
    pytest.param("qwen3_moe", 3, marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def alone(runs: Runs, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's run on one rank, made when it is first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = run = tmp_path_factory.mktemp("alone") / "run"
            runs.train(arguments(run, conversations, stage=0, **(SETTINGS | FAMILIES[family])))
            return run

    return Made()


@pytest.mark.parametrize(("family", "stage"), CASES)
def test_two_ranks_are_one_and_survive_a_kill(
    family: str, stage: int, alone: dict[str, Path], runs: Runs, conversations: Path, place: Path
) -> None:
    settings = SETTINGS | FAMILIES[family]
    calm, killed = place / "calm", place / "killed"
    runs.train(arguments(calm, conversations, stage=stage, **settings), 2)
    assert losses(calm) == pytest.approx(losses(alone[family]), abs=1e-5, rel=0)
    own, expected = ([record["experts"] for record in steps(run)] for run in (calm, alone[family]))
    for mine, theirs in zip(own, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-2)  # a token at the boundary between two experts may change sides
        assert mine["load"] >= 1
    argv = arguments(killed, conversations, stage=stage, resume="auto", **settings)
    job = runs.start(argv, 2, partial(held_at, STEPS - 1))
    job.wait_for_step(4)
    job.kill()
    runs.train(argv, 2)
    assert differing(final(killed, STEPS), final(calm, STEPS)) == []
    assert [record["step"] for record in steps(killed)] == list(range(1, STEPS + 1))


@pytest.mark.long
@pytest.mark.parametrize(("family", "stage"), [("mixtral", 2), ("mixtral", 3), ("qwen3_moe", 2), ("qwen3_moe", 3)])
def test_resized_from_two_ranks_to_one_to_three(
    family: str, stage: int, alone: dict[str, Path], runs: Runs, conversations: Path, place: Path
) -> None:
    run, settings = place / "run", SETTINGS | FAMILIES[family]
    for world, last in ((2, 3), (1, 6), (3, STEPS)):
        # The schedule is that of the whole run: a start is killed once it has saved its step.
        argv = arguments(run, conversations, stage=stage, resume="auto", **(settings | {"save_every_n_batches": 1}))
        job = runs.start(argv, world, partial(held_at, STEPS - 1) if last < STEPS else None)
        if last < STEPS:
            job.wait_for_step(last)
            job.kill()
        else:
            assert job.wait() == [0] * world, job.stderr()
    assert [record["step"] for record in steps(run)] == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(alone[family]), abs=1e-5, rel=0)
    starts = [line for line in (run / "train.log").read_text().splitlines() if "process(es)" in line]
    assert [world for line in starts for world in (1, 2, 3) if f", {world} process(es)" in line] == [2, 1, 3]
