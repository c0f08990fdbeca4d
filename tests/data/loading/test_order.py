"""Law 1: the samples of a step depend on fingerprint, seed, epoch and global batch size, and on nothing else."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data import GlobalOrder
from lumina.data.loading.order import PADDING, Permutation, deal, sample_sums, samples_id

sizes = st.integers(1, 300)


@given(st.integers(1, 3000), st.binary(max_size=8))
def test_the_permutation_is_a_bijection(size: int, key: bytes) -> None:
    image = Permutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_the_permutation_mixes() -> None:
    size = 10_000
    image = Permutation(size, b"key")(np.arange(size))
    # For a uniform permutation the correlation of index and image is N(0, 1/size): 5 sigma is 0.05.
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05
    assert (Permutation(size, b"other")(np.arange(size)) == image).sum() < 20  # expected 1 fixed coincidence


@given(sizes, st.integers(1, 40), st.integers(0, 5))
def test_an_epoch_takes_every_sample_once(size: int, batch: int, epoch: int) -> None:
    order = GlobalOrder(size, batch, seed=7, fingerprint="f")
    first = epoch * order.steps_per_epoch
    taken = np.concatenate([order.indices(step) for step in range(first, first + order.steps_per_epoch)])
    assert np.array_equal(np.sort(taken), np.arange(size))
    assert taken.dtype == np.int64
    assert order.epoch_of(first) == epoch
    assert order.batch_in_epoch(first) == 0


@given(sizes, st.integers(1, 40), st.integers(0, 50), st.integers(1, 5), st.integers(1, 5))
def test_every_world_deals_the_same_samples(size: int, batch: int, step: int, world: int, micro: int) -> None:
    order = GlobalOrder(size, batch, seed=7, fingerprint="f")
    shares = [order.shard(step, rank, world, micro) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "ranks must have equally many micro-batches"
    assert all(len(micro_batch) == micro for share in shares for micro_batch in share)
    dealt = np.concatenate([micro_batch for share in shares for micro_batch in share])
    assert np.array_equal(np.sort(dealt[dealt != PADDING]), np.sort(order.indices(step)))
    # No more padding than a last round of micro-batches needs.
    assert (dealt == PADDING).sum() < world * micro


def test_what_the_order_depends_on() -> None:
    base = GlobalOrder(1000, 8, seed=1, fingerprint="a").indices(3)
    assert np.array_equal(base, GlobalOrder(1000, 8, seed=1, fingerprint="a").indices(3))
    for other in (
        GlobalOrder(1000, 8, seed=2, fingerprint="a").indices(3),
        GlobalOrder(1000, 8, seed=1, fingerprint="b").indices(3),
        GlobalOrder(1000, 8, seed=1, fingerprint="a").indices(3 + 125),
    ):
        assert not np.array_equal(base, other)


def test_the_order_is_fixed_for_good() -> None:
    """A run resumed under a later version must see the same data: these numbers may never change."""
    assert GlobalOrder(1000, 4, seed=1234, fingerprint="lumina").indices(0).tolist() == FIRST
    assert GlobalOrder(10**9, 4, seed=1234, fingerprint="lumina").indices(10**9).tolist() == LATER


FIRST = [744, 181, 50, 958]
LATER = [934270388, 228833206, 617227863, 94124249]
SMALL = [
    (1, [0]),
    (4, [2, 3, 1, 0]),
    (5, [0, 2, 1, 4, 3]),
    (16, [11, 12, 10, 8, 3, 9, 2, 7, 4, 14, 1, 13, 6, 15, 0, 5]),
    (17, [10, 3, 1, 4, 16, 14, 2, 8, 9, 12, 6, 15, 11, 13, 7, 0, 5]),
]


@pytest.mark.parametrize(("size", "image"), SMALL)
def test_so_are_those_of_sizes_about_a_power_of_four(size: int, image: list[int]) -> None:
    """Where the domain of the permutation changes."""
    assert Permutation(size, b"lumina")(np.arange(size)).tolist() == image


def test_one_order_goes_from_epoch_to_epoch_and_back() -> None:
    order = GlobalOrder(10, 2, seed=1, fingerprint="a")
    for step in (0, 5, 6, 1, 12, 0):
        assert np.array_equal(order.indices(step), GlobalOrder(10, 2, seed=1, fingerprint="a").indices(step))


def test_ranks_count_from_zero() -> None:
    for rank in (-1, 2):
        with pytest.raises(AssertionError):
            GlobalOrder(10, 2, seed=1, fingerprint="a").shard(0, rank, 2, 1)


# --- The record of a step's samples ---------------------------------------------------------------

samples = st.lists(st.integers(0, 2**40), max_size=40)


def id_of(*shares: list[int]) -> str:
    """The record of samples that lie on several ranks."""
    sums = np.array([sample_sums(np.array(share, dtype=np.int64)) for share in shares])
    return samples_id(*sums.sum(axis=0))  # as an all-reduce in float64 adds them up


@given(samples, st.randoms(use_true_random=False), st.integers(1, 5), st.integers(1, 4))
def test_the_record_does_not_depend_on_order_or_ranks(taken: list[int], draw: Random, world: int, micro: int) -> None:
    mixed = list(taken)
    draw.shuffle(mixed)
    shares = [np.concatenate([*deal(np.array(mixed, np.int64), rank, world, micro), []]) for rank in range(world)]
    dealt = [[int(sample) for sample in share if sample != PADDING] for share in shares]
    assert id_of(*dealt) == id_of(taken)


@given(samples, samples)
def test_other_samples_have_another_record(one: list[int], other: list[int]) -> None:
    """Repeated ones count as often as they are there."""
    assert (id_of(one) == id_of(other)) == (sorted(one) == sorted(other))


def test_one_too_few_too_many_or_exchanged() -> None:
    whole = list(range(1000))
    others = [whole[:-1], [*whole, 1000], [*whole[:-1], 1000], [*whole[:-1], 0]]
    assert len({id_of(whole), *map(id_of, others)}) == 5


def test_the_record_is_splitmix64s_sum() -> None:
    """The first outputs of splitmix64 seeded with 0 and 1234567, as published with the algorithm's test vectors."""
    assert id_of([0]) == "1:e220a8397b1dcdaf"
    assert id_of([1234567]) == f"1:{6457827717110365317:016x}"


def splitmix64(sample: int) -> int:
    """The first output from the state `sample`, in Python's integers (https://prng.di.unimi.it/splitmix64.c)."""
    z = (sample + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@given(samples)
def test_the_sum_goes_round_at_32_bits(taken: list[int]) -> None:
    halves = [(splitmix64(sample) >> 32, splitmix64(sample) % 2**32) for sample in taken]
    high, low = sum(half for half, _ in halves), sum(half for _, half in halves)
    assert id_of(taken) == f"{len(taken)}:{high % 2**32:08x}{low % 2**32:08x}"


def test_two_million_samples_are_added_exactly() -> None:
    whole = np.arange(2_000_000)
    parts = np.array([sample_sums(part) for part in np.array_split(whole, 7)]).sum(axis=0)
    assert tuple(parts) == sample_sums(whole)
    assert samples_id(*parts) == samples_id(*sample_sums(whole[::-1]))
