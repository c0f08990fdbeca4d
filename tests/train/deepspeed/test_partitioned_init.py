"""Weights that are divided as they are drawn are those of a model built whole, and no rank ever holds two matrices."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lumina.checkpoint import CheckpointReader
from lumina.config import deepspeed as ds_json
from lumina.model import Transformer
from lumina.model.lora import attach
from lumina.train.deepspeed import init_process_group, partitioned_init, sync_weights
from tests.runs import Runs, arguments, differing, final
from tests.train.tiny_engines import make_config, make_engine, same_state, state_of, train_step

ADAPTERS: dict[str, Any] = {"lora_rank": 3, "lora_targets": ["q_proj", "o_proj", "down_proj"]}


def settings(stage: int = 3, **zero: Any) -> dict[str, Any]:
    document = ds_json.default_json(1)
    document["zero_optimization"] |= {"stage": stage, **zero}
    return ds_json.resolve(make_config(), 1, "cpu", bf16_supported=True, document=document).json


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"family": "qwen2"}, ADAPTERS, ADAPTERS | {"tie_word_embeddings": False}],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_are_those_of_a_whole_model(
    precision: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: what is trained, what is frozen, the generator afterwards, and two steps."""
    made = make_engine(3, precision, **changes)
    random = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(partitioned_init, "partitions_on_init", lambda _: False)
        whole = make_engine(3, precision, **changes)
    assert torch.equal(torch.get_rng_state(), random)
    assert same_state(state_of(made), state_of(whole))
    for (name, own), (other, reference) in zip(
        made.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert (name, own.requires_grad, own.dtype) == (other, reference.requires_grad, reference.dtype)
        assert torch.equal(own.ds_tensor, reference.ds_tensor), name  # type: ignore[attr-defined]
    decays = [[g["weight_decay"] for g in engine.optimizer.param_groups] for engine in (made, whole)]
    assert decays[0] == decays[1]
    assert [train_step(made, seed) for seed in (0, 1)] == [train_step(whole, seed) for seed in (0, 1)]
    assert same_state(state_of(made), state_of(whole))


@pytest.mark.parametrize("lora", [False, True])
def test_no_two_matrices_are_whole_at_once(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    init_process_group()
    config, most = make_config(**(ADAPTERS if lora else {})), 0
    living: list[nn.Parameter] = []
    register = nn.Module.register_parameter

    def watched(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal most
        register(module, name, parameter)
        if parameter is not None:
            living.append(parameter)
            most = max(most, sum(p.numel() for p in living))

    monkeypatch.setattr(nn.Module, "register_parameter", watched)
    with partitioned_init.partition_on_init(settings()):
        model = Transformer(config)
        if lora:
            attach(model, config)
    assert [p.numel() for p in model.parameters()] == [0] * len(list(model.parameters()))
    largest = max(p.ds_numel for p in model.parameters())  # type: ignore[attr-defined]
    assert largest <= most <= largest + 2 * config.hidden_size
    assert nn.Linear(2, 2).weight.numel() == 4, "only what is built inside"


def test_nothing_is_drawn_where_all_is_loaded() -> None:
    init_process_group()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with partitioned_init.partition_on_init(settings(), drawn=False):
        Transformer(make_config(tie_word_embeddings=False))
    assert torch.equal(torch.get_rng_state(), before)
    with partitioned_init.partition_on_init(settings(stage=2), drawn=False):
        model = Transformer(make_config())
    assert not torch.equal(torch.get_rng_state(), before), "other stages draw as ever"
    assert all(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({}, True),
        ({"stage": 2}, False),
        ({"offload_param": {"device": "cpu"}}, True),
        ({"offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}, False),
        ({"zero_quantized_nontrainable_weights": True}, False),
    ],
    ids=str,
)
def test_when_weights_are_divided(zero: dict[str, Any], expected: bool) -> None:
    assert partitioned_init.partitions_on_init({"zero_optimization": {"stage": 3} | zero}) == expected
    assert not partitioned_init.partitions_on_init({})


def test_loading_drops_the_second_copies_of_hpz() -> None:
    """hpZ gathers from a copy within the node. On four ranks in pairs that kept theirs, the first loss after
    --init-from was NaN: of what was there before the weights were loaded."""
    made = make_engine(3)
    for parameter in made.model.parameters():
        parameter.ds_secondary_tensor = torch.zeros(3)  # type: ignore[attr-defined]
    sync_weights(made)
    assert all(parameter.ds_secondary_tensor is None for parameter in made.model.parameters())  # type: ignore[attr-defined]


# --- Several ranks --------------------------------------------------------------------------------


def built_whole(rank: int) -> None:
    """In a rank's process: as it was before weights were divided while they are drawn."""
    partitioned_init.partitions_on_init = lambda _: False


def reads(place: Path, rank: int) -> None:
    """In a rank's process: note how many elements are read from checkpoints."""
    read = CheckpointReader.read

    def noted(self: CheckpointReader, key: str, name: str, start: int, out: torch.Tensor) -> None:
        with (place / f"reads-{rank}").open("a") as file:
            file.write(f"{name} {start} {out.numel()} {self.numel(name)}\n")
        read(self, key, name, start, out)

    CheckpointReader.read = noted  # type: ignore[method-assign]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_three_ranks(runs: Runs, conversations: Path, place: Path) -> None:
    """Shares that end in padding: the same run either way, from draws, from another run's weights and over them. Each
    rank reads a third of these."""
    common = {"max_steps": 2, "precision": "bf16", "global_batch_size": 3, "save_every_n_batches": 1000}

    def train(name: str, patch: Any = None, **changes: Any) -> Path:
        words = arguments(place / name, conversations, stage=3, **common, **changes)
        job = runs.start(words, 3, patch=patch)
        assert job.wait() == [0, 0, 0], job.stderr()
        return place / name

    begun = train("drawn")
    assert differing(final(begun, 2), final(train("drawn-whole", built_whole), 2)) == []
    given = {"init_from": begun}
    loaded = train("loaded", partial(reads, place), **given)
    assert differing(final(loaded, 2), final(train("loaded-whole", built_whole, **given), 2)) == []
    given |= {"lora_rank": 2}
    adapted = train("adapted", partial(reads, place), **given)
    assert differing(final(adapted, 2), final(train("adapted-whole", built_whole, **given), 2)) == []
    for rank in range(3):
        found = [line.split() for line in (place / f"reads-{rank}").read_text().splitlines()]
        for name in {name for name, *_ in found}:
            starts, counts, sizes = zip(*(map(int, rest) for one, *rest in found if one == name), strict=True)
            third = -(-sizes[0] // 3)
            assert set(starts) == {rank * third}
            assert set(counts) == {min(third, sizes[0] - rank * third)}
            assert len(starts) == 2, "once by each of the two runs"
