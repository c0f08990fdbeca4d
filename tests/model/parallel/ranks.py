"""Four processes that share rows, and one that has them whole:  python -m tests.model.parallel.ranks FILE

FILE is where the processes meet. Each case is a model and a row of documents; printed is, as JSON by case, the largest
difference from the whole row's loss and gradients, relative to the norm of each. By size of the group, also the bytes
that a rank sends to others in one pass forward and backward.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lumina.data import Batch, Part
from lumina.model import SequenceGroup, Transformer, sequence_group
from tests.model.tiny_models import make_model

WORLD = 4
BETA = 0.3
VOCABULARY = 61


@dataclass(frozen=True)
class Case:
    """lengths: of the documents; learned: the tokens that may be supervised, half of which are; pairs: the documents
    are answers, two a pair; groups: of heads, one at a time."""

    size: int
    shape: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (70, 1, 40, 150, 33)  # 294 tokens: no size divides them, and bounds lie inside parts
    learned: tuple[int, int] = (0, 1000)
    pairs: bool = False
    groups: int = 1
    dtype: torch.dtype = torch.float64


_WIDE = {"hidden_size": 48, "num_heads": 6}
CASES = {
    **{f"{kv} KV heads, {size} ranks": Case(size, {"num_kv_heads": kv}) for kv in (1, 2, 4) for size in (2, 4)},
    "3 KV heads, 2 ranks": Case(2, {**_WIDE, "num_kv_heads": 3}),
    "one document": Case(4, lengths=(333,)),
    "documents end where parts do": Case(2, lengths=(64, 64, 64, 64)),
    "parts of padding alone": Case(4, lengths=(5, 20)),
    "all that is learned in one part": Case(4, learned=(130, 180)),
    "nothing is learned": Case(2, learned=(0, 0)),
    "window": Case(4, {"family": "mistral", "sliding_window": 9}),
    "soft caps, scale, windows in some layers": Case(
        2,
        {"family": "gemma2", "sliding_window": 9, "sliding_layers": [0], "attention_softcap": 4.0}
        | {"logit_softcap": 3.0, "attention_scale": 0.2},
    ),
    "norms of queries and keys": Case(2, {"family": "qwen3"}),
    "biases": Case(4, {"family": "qwen2"}),
    "pairs": Case(2, lengths=(30, 44, 90, 61), pairs=True),
    "pairs, 4 ranks": Case(4, lengths=(30, 44, 90, 61), pairs=True),
    "groups of heads": Case(2, {"num_kv_heads": 2}, groups=2),
    "groups of heads, norms": Case(
        4, {"hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "family": "qwen3"}, groups=2
    ),
    "bfloat16": Case(2, dtype=torch.bfloat16),
}


def row(case: Case, part: Part) -> Batch:
    """The case's row, of its tokens those of `part`."""
    draw = np.random.default_rng(7)
    edges = np.cumsum([0, *case.lengths]).astype(np.int32)
    tokens = int(edges[-1])
    ids = draw.integers(VOCABULARY, size=tokens)
    weights = (draw.random(tokens) < 0.5).astype(np.float32)
    weights[edges[1:] - 1] = 0.0
    weights[: case.learned[0]] = weights[case.learned[1] :] = 0.0
    positions = np.concatenate([np.arange(length) for length in case.lengths])
    own = slice(*part.bounds(tokens))
    arrays = (each[own] for each in (ids, np.roll(ids, -1), weights, positions))
    made = Batch(*arrays, edges, max(case.lengths), part=part)
    if case.pairs:
        count = len(case.lengths) // 2
        made.pairs_P3 = np.stack([draw.normal(size=count), np.ones(count), draw.normal(size=count)], 1).astype("f4")
    return made


def computed(model: Transformer, case: Case, sequence: SequenceGroup | None) -> list[Tensor]:
    """The losses' sums and the gradient of the first by each parameter, over all ranks of the group; float64."""
    for parameter in model.parameters():
        parameter.grad = None
    made = row(case, Part() if sequence is None else Part(sequence.index, sequence.size)).torch()
    options: dict[str, Any] = {}
    if case.pairs:
        options = {"documents_N": made.documents_N, "pairs_P3": made.pairs_P3, "beta": BETA}
    given = made.ids_T[None], made.positions_T[None], made.cu_seqlens_D, made.max_seqlen, made.targets_N, made.weights_N
    sums = model(*given, supervised_N=made.supervised_N, bounds=made.bounds, **options).reshape(-1)
    (sums[0] * 1.0).backward()
    found = [sums.detach(), torch.tensor([made.units])]
    found += [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in model.parameters()]
    found = [value.detach().double() for value in found]
    return found if sequence is None else [sequence.sum(value) for value in found]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    sizes = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, expected, strict=True)]
    return max(sizes)


def compare(case: Case) -> dict[str, float]:
    sequence = sequence_group(case.size)
    assert sequence is not None
    exact = {"dtype": torch.float64}

    def model(dtype: torch.dtype) -> Transformer:
        return make_model(dtype=dtype, num_layers=2, seq_length=512, **case.shape)

    expected = computed(model(**exact), case, None)
    shared = model(case.dtype)
    shared.share_rows(sequence)
    shared.group_heads(case.groups)
    sizes = {"shared": difference(computed(shared, case, sequence), expected)}
    if case.dtype is not torch.float64:
        sizes["whole"] = difference(computed(model(case.dtype), case, None), expected)
    return sizes


def sent(size: int) -> dict[str, float]:
    """Bytes that leave a rank in exchanges, per token of its own and layer, of a model in float64; and as its clock is
    told."""
    exchanged, counted, told, announced = dist.all_to_all_single, [0.0], [0], [0]

    def counting(found: Tensor, given: Tensor, **options: Any) -> Any:
        counted[0] += given.nbytes * (size - 1) / size
        told[0] += announced[0]
        return exchanged(found, given, **options)

    case, sequence = Case(size), sequence_group(size)
    assert sequence is not None
    model = make_model(dtype=torch.float64, num_layers=2, seq_length=512)
    model.share_rows(sequence)

    @contextmanager
    def exchanging(sent: int) -> Iterator[None]:
        announced[0] = sent
        yield

    with patch.object(dist, "all_to_all_single", counting), patch.object(sequence, "exchanging", exchanging):
        computed(model, case, sequence)
    own = -(-sum(case.lengths) // (64 * size)) * 64
    return {"bytes": counted[0] / own / 2, "told": told[0] / own / 2}


def untimed() -> dict[str, float]:
    """How many of the collectives of a pass over pairs a clock does not see, and how many it does."""
    case, sequence, inside = CASES["pairs"], sequence_group(2), [False]
    assert sequence is not None
    model = make_model(dtype=torch.float64, num_layers=2, seq_length=512)
    model.share_rows(sequence)
    seen: list[bool] = []

    @contextmanager
    def exchanging(sent: int) -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **options: Any) -> Any:
            seen.append(inside[0])
            return call(*args, **options)

        return collective

    with (
        patch.object(dist, "all_to_all_single", noted(dist.all_to_all_single)),
        patch.object(dist, "all_reduce", noted(dist.all_reduce)),
        patch.object(sequence, "exchanging", exchanging),
    ):
        computed(model, case, sequence)
    return {"untimed": seen.count(False), "timed": seen.count(True)}


def main(meeting: str) -> None:
    torch.set_num_threads(1)
    rank = next((number for number in range(1, WORLD) if os.fork() == 0), 0)
    patience = timedelta(seconds=300)  # of ranks that do not do the same
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD, timeout=patience)
    results = {name: compare(case) for name, case in CASES.items()}
    results |= {f"sent, {size} ranks": sent(size) for size in (2, 4)}
    results["clock"] = untimed()
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, results)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{meeting}2", rank=rank, world_size=WORLD, timeout=patience)
    sequence = sequence_group(2)
    assert sequence is not None
    assert sequence is sequence_group(2)
    sum_of_two = sequence.sum(torch.ones(1)).item()
    known = sequence.group in torch.distributed.distributed_c10d._world.pg_map
    if rank == 0:
        worst = {
            name: {kind: max(one[name][kind] for one in every) for kind in sizes} for name, sizes in results.items()
        }
        worst["another process group"] = {"sum": sum_of_two, "known": float(known)}
        print(json.dumps(worst), flush=True)
        for _ in range(1, WORLD):
            os.wait()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
