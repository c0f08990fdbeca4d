"""An objective of another installed package: it says what data is taken and how a micro-batch is scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina.chat import open_tokenizer
from lumina.config import UserError, load
from lumina.train.objectives import objective

HALF = """
from lumina.train.objectives.sft import SupervisedFineTuning

class Half(SupervisedFineTuning):
    def loss(self, forward, batch, scale):
        return 0.5 * super().loss(forward, batch, scale)

THING = Half
"""


class Batch:
    weights_N = torch.tensor([1.0, 0.0, 2.0])


def scored(name: str) -> float:
    def forward(batch: Any, weights_N: torch.Tensor, **options: Any) -> torch.Tensor:
        return (weights_N * torch.tensor([3.0, 5.0, 7.0])).sum()

    made = objective(load("nano", {"objective": name}))
    return float(made.loss(forward, Batch(), 0.25))  # type: ignore[arg-type]


def test_it_scores(install: Callable[..., None]) -> None:
    install("lumina.objectives", "half", HALF)
    assert scored("sft") == 0.25 * (3.0 + 2 * 7.0)
    assert scored("half") == 0.5 * scored("sft")


def test_dpo_is_told_what_it_learns_over() -> None:
    with pytest.raises(UserError, match="objective dpo moves a model away from what it began as"):
        objective(load("nano", {"objective": "dpo"})).prepare_data(open_tokenizer(None))


def test_pairs_are_neither_held_out_nor_deduplicated(tmp_path: Path) -> None:
    config = load("nano", {"objective": "dpo", "init_from": str(tmp_path), "dedup": "exact"})
    with pytest.raises(UserError, match="dedup is not for preference pairs"):
        objective(config).prepare_data(open_tokenizer(None))


def test_a_misspelt_one_is_told_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no such objective: dop. Did you mean dpo\? There are: dpo, sft"):
        load("nano", {"objective": "dop"})
