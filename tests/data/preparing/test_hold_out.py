"""Hold-out over drawn groups: whole groups, never all, the nearest share where hashes miss it by far."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.preparing.hold_out import hold_out


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=9),
    st.floats(0.001, 0.999),
    st.randoms(use_true_random=False),
)
def test_what_is_held_out(sizes: list[int], asked: float, rng: np.random.Generator) -> None:
    group_N = [group for group, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(group_N)
    first = {group: group_N.index(group) for group in set(group_N)}
    root_N = np.array([first[group] for group in group_N])
    hash_N = np.array([rng.getrandbits(64) or 1 for _ in group_N], dtype=np.uint64)
    held_N, outcome = hold_out(root_N, hash_N, np.ones(len(root_N), dtype=np.bool_), asked)
    total, target = len(group_N), asked * len(group_N)
    sides = [{group for group, held in zip(group_N, held_N, strict=True) if held == side} for side in (True, False)]
    assert not sides[0] & sides[1], "a group is on both sides"
    assert outcome.held == held_N.sum()
    assert outcome.groups == len(sizes)
    assert len(outcome.largest_N) == max(sizes)
    sums = {sum(chosen) for count in range(1, len(sizes)) for chosen in combinations(sizes, count)}
    if len(sizes) == 1:
        assert outcome.refused
        return
    assert 0 < outcome.held < total, "a side is empty"
    if outcome.by_hash:
        assert target / 2 <= outcome.held <= 2 * target
        assert total - outcome.held >= (total - target) / 2
    elif outcome.refused:
        # No share that can be held out is near: the smallest is more than twice what was asked.
        assert outcome.held == min(sums)
        assert min(sums) > 2 * target
    elif outcome.held > 2 * target:
        assert outcome.held == 1


def test_groups_of_one_are_held_out_by_their_hashes_alone() -> None:
    rng = np.random.default_rng(0)
    hash_N = rng.integers(1, 2**63, 2000, dtype=np.uint64)
    every = np.ones(2000, dtype=np.bool_)
    held_N, outcome = hold_out(np.arange(2000), hash_N, every, 0.1)
    assert outcome.by_hash
    assert not outcome.refused
    part_N, _ = hold_out(np.arange(1000), hash_N[:1000], every[:1000], 0.1)
    assert (held_N[:1000] == part_N).all()


def test_a_large_group_stays_for_training() -> None:
    """Whatever its hash: 900 of one group and 100 single ones."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        root_N = np.array([0] * 900 + list(range(900, 1000)))
        held_N, outcome = hold_out(root_N, rng.integers(1, 2**63, 1000, dtype=np.uint64), np.ones(1000, np.bool_), 0.05)
        assert not held_N[:900].any()
        assert 25 <= held_N.sum() <= 100
        assert not outcome.refused
