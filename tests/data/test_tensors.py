"""What the model is given of a batch: whole tiles of rows, and everything that a device would be asked for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from lumina.config.rows import ROW_TILE, round_up
from lumina.data import Batch
from lumina.data.dataset import join


def batch(lengths: list[int], supervised: float = 0.5, seed: int = 0) -> Batch:
    draw = np.random.default_rng(seed)
    ids = [draw.integers(1, 100, length).astype(np.int32) for length in lengths]
    return join(ids, [(draw.random(length) < supervised).astype(np.uint8) for length in lengths])


def test_whole_tiles() -> None:
    assert [round_up(n) for n in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]


@pytest.mark.parametrize("lengths", [[40, 7, 33], [64], [1], [100, 60, 32], [5, 300]])
@pytest.mark.parametrize("supervised", [0.0, 0.02, 0.5, 1.0])
def test_nothing_is_lost_and_what_is_added_weighs_nothing(lengths: list[int], supervised: float) -> None:
    given = batch(lengths, supervised)
    found, tokens = given.torch(), sum(lengths)
    assert len(found.ids_T) == len(found.positions_T) == round_up(tokens)
    assert found.ids_T[:tokens].tolist() == given.ids_T.tolist()
    assert found.positions_T[:tokens].tolist() == given.positions_T.tolist()
    # The tokens that fill a tile are a document of their own, which nobody attends to and nothing is learned from.
    edges = given.cu_seqlens_D.tolist() + [round_up(tokens)] * (tokens % ROW_TILE != 0)
    assert found.cu_seqlens_D.tolist() == list(found.bounds) == edges
    assert found.cu_seqlens_D.dtype is torch.int32
    assert found.max_seqlen == max(end - start for start, end in pairwise(edges))
    wanted = np.flatnonzero(given.weights_T)
    count = len(wanted)
    assert len(found.supervised_N) == len(found.targets_N) == len(found.weights_N) == round_up(count)
    assert found.supervised_N[:count].tolist() == wanted.tolist()
    assert found.targets_N[:count].tolist() == given.targets_T[wanted].tolist()
    assert found.weights_N[:count].tolist() == given.weights_T[wanted].tolist()
    assert not found.weights_N[count:].any()
    assert found.supervised_N[count:].tolist() == [0] * (round_up(count) - count)
    assert found.units == count
    assert {found.ids_T.dtype, found.positions_T.dtype, found.supervised_N.dtype, found.targets_N.dtype} == {
        torch.int64
    }
    assert found.weights_N.dtype is torch.float32


def test_pairs_know_the_document_of_each_supervised_token() -> None:
    given = batch([9, 14, 20, 11], 0.7)
    given.pairs_P2 = np.array([[1.0, 1.0], [0.5, 0.0]], dtype=np.float32)
    found = given.torch()
    assert found.documents_N is not None
    assert found.units == 1.0
    bounds = given.cu_seqlens_D
    for where, document, weight in zip(found.supervised_N, found.documents_N, found.weights_N, strict=True):
        assert bounds[document] <= where < bounds[document + 1]
        assert weight in (0, 1)
    assert int(found.weights_N.sum()) == int(given.weights_T.sum())
