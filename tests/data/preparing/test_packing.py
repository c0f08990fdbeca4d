"""Packing against best-fit decreasing written the slow way, chunk by chunk."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.preparing.packing import pack, rows_to_chunks


def slow_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The rooms left in the rows, by the textbook: each chunk into the fullest row that takes it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_the_same_rows_as_the_slow_way(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    row_of = pack(np.array(lengths, dtype=np.int32), capacity)
    used = np.bincount(row_of, weights=lengths).astype(int) if lengths else np.empty(0, int)
    assert sorted((capacity - used).tolist()) == slow_best_fit_decreasing(lengths, capacity)


def test_large_random_lengths_against_the_slow_way() -> None:
    rng = np.random.default_rng(3)
    lengths = np.minimum(1024, 1 + rng.lognormal(5.5, 1.0, 3000).astype(np.int32)).astype(np.int32)
    used = np.bincount(pack(lengths, 1024), weights=lengths).astype(int)
    assert sorted((1024 - used).tolist()) == slow_best_fit_decreasing(lengths.tolist(), 1024)


@given(st.lists(st.integers(0, 9), min_size=1))
def test_rows_to_pieces_groups_every_piece_once(rows: list[int]) -> None:
    row_of = np.unique(rows, return_inverse=True)[1]  # rows numbered without gaps
    chunks, offsets = rows_to_chunks(row_of)
    assert len(offsets) == row_of.max() + 2
    for row, (first, last) in enumerate(itertools.pairwise(offsets)):
        assert chunks[first:last].tolist() == [chunk for chunk, its_row in enumerate(row_of) if its_row == row]


def test_memory_does_not_grow_with_the_context() -> None:
    lengths = np.arange(1, 200, dtype=np.int32) * 20_000
    tracemalloc.start()
    try:
        rows = pack(lengths, 1 << 22)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert np.bincount(rows, weights=lengths).max() <= 1 << 22


def test_the_rows_are_fixed_for_good() -> None:
    """Which of several equal chunks goes where is part of the order that law 1 promises: these may never change."""
    lengths = np.array([3, 2, 3, 2, 1, 3, 2, 1, 1, 4] * 2, dtype=np.int32)
    assert pack(lengths, 6).tolist() == [2, 0, 2, 1, 6, 3, 5, 6, 6, 0, 3, 5, 4, 5, 6, 4, 6, 7, 7, 1]


def test_no_chunks_are_no_rows() -> None:
    none = np.empty(0, dtype=np.int64)
    chunks, offsets = rows_to_chunks(none)
    assert (chunks.tolist(), offsets.tolist()) == ([], [0])


def test_a_piece_longer_than_a_row_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError):
        pack(np.array([5], dtype=np.int32), 4)
