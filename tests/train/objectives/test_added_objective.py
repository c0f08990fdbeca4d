"""An objective of another installed package: it says what data is taken and how a micro-batch is scored. Its data set
need not know of ranks that share rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lumina.chat import open_tokenizer
from lumina.config import UserError, load
from lumina.data import Batch as Row
from lumina.data import GlobalOrder, Loader, Part
from lumina.train.agreement import agree_on_contents
from lumina.train.deepspeed import Ranks
from lumina.train.evaluate import evaluate
from lumina.train.objectives import objective
from tests.runs import Runs, arguments, steps
from tests.train.tiny_engines import arrays, make_engine

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


class Foreign:
    """A data set without a folder, which makes whole rows alone."""

    fingerprint = "none of Lumina's"

    def __init__(self, own: Any = None) -> None:
        self.own, self.num_samples = own, 3 if own is None else own.num_samples
        forty = np.full(3, 40, dtype=np.int32)
        self.tokens_per_sample = forty if own is None else own.tokens_per_sample
        self.supervised_per_sample = forty if own is None else own.supervised_per_sample

    def account_lines(self) -> list[str]:
        return []

    def supervised_share(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.ones(len(indices))

    def batch(self, indices: Any) -> Row:
        row: Row = arrays(int(indices[0])) if self.own is None else self.own.batch(indices)
        return row


def test_its_data_set_is_asked_for_no_part_unless_ranks_share_rows() -> None:
    data: Any = Foreign()
    order = GlobalOrder(3, 3, 0, data.fingerprint)
    for replace_corrupt in (False, True):
        loader = Loader(
            data, order, rank=0, world=1, micro_batch_size=1, start_step=0, stop_step=1, replace_corrupt=replace_corrupt
        )
        (made,) = loader
        assert [len(row.ids_T) for row in made.micro_batches] == [40, 40, 40]
        assert made.corrupt == []
    ranks = Ranks(0, 1, 0, 1)
    agree_on_contents(ranks, [data])
    loss = evaluate(make_engine(0), data, 1, ranks).loss
    assert 0 < loss < 100
    with pytest.raises(UserError, match=r"Foreign of tests.train.objectives.test_added_objective has no `folder`"):
        agree_on_contents(replace(ranks, world=2, sequence=2), [data])
    loader.part = Part(0, 2)
    with pytest.raises(TypeError):
        list(loader)


def _foreign(rank: int) -> None:
    from lumina.train.objectives.sft import SupervisedFineTuning as Objective

    prepare = Objective.prepare_data
    Objective.prepare_data = lambda *given, **named: (Foreign(prepare(*given, **named)[0]), None)  # type: ignore


@pytest.mark.long
def test_a_run_over_its_data_set(runs: Runs, conversations: Path, place: Path) -> None:
    argv = arguments(place / "run", conversations, stage=0, max_steps=2, global_batch_size=2)
    job = runs.start(argv, 1, _foreign)
    assert job.wait() == [0], job.stderr()
    assert [record["step"] for record in steps(place / "run")] == [1, 2]
