"""Global sample order (law 1): the samples of step k, whatever the number of ranks.

An epoch's order is a keyed permutation computed one index at a time (a balanced Feistel network, walked until it lands
inside the range: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), so there is no shuffled list to
build, keep or skip through. The state of the data is the step number, and starting at step 10 million costs what
starting at step 0 costs.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6  # Luby & Rackoff need 4 for a strong pseudo-random permutation; small domains like two more
PADDING = -1


def _mix(x: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The round function: SplitMix64's finaliser (Steele, Lea & Flood, 2014) over x + key, modulo 2^64."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A bijection of [0, size) chosen by a key, evaluated index by index in O(1) memory."""

    def __init__(self, size: int, key: bytes) -> None:
        assert size >= 1
        self.size = size
        half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._low = np.uint64((1 << half) - 1)
        digest = hashlib.shake_256(key).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def _encrypt(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & self._low)
        return (left << self._half) | right

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of `indices` (int64[n], each in [0, size)). The domain is under 4x the size: about 2-4 walks each."""
        out = self._encrypt(indices.astype(np.uint64))
        outside = np.flatnonzero(out >= self.size)
        while outside.size:
            out[outside] = self._encrypt(out[outside])
            outside = outside[out[outside] >= self.size]
        return out.astype(np.int64)


class GlobalOrder:
    """The samples of every global step, from (data fingerprint, seed, epoch, global batch size) alone.

    The last batch of an epoch is short when the sizes do not divide; nothing is dropped and nothing repeats within an
    epoch. World size and micro-batch size enter only in `shard`, which deals a step's samples out.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int, fingerprint: str) -> None:
        assert num_samples >= 1, "a data set without samples has no order"
        assert global_batch_size >= 1
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.fingerprint = fingerprint
        self.steps_per_epoch = -(-num_samples // global_batch_size)
        self._cached: tuple[int, Permutation] | None = None

    def _permutation(self, epoch: int) -> Permutation:
        if self._cached is None or self._cached[0] != epoch:
            key = f"{self.fingerprint}:{self.seed}:{epoch}:{self.num_samples}".encode()
            self._cached = (epoch, Permutation(self.num_samples, key))
        return self._cached[1]

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that global step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def batch_in_epoch(self, step: int) -> int:
        """The position (from 0) of global step `step` within its epoch."""
        return step % self.steps_per_epoch

    def indices(self, step: int) -> NDArray[np.int64]:
        """The samples of global step `step` (from 0): int64[n], n <= global_batch_size."""
        assert step >= 0
        first = self.batch_in_epoch(step) * self.global_batch_size
        last = min(first + self.global_batch_size, self.num_samples)
        return self._permutation(self.epoch_of(step))(np.arange(first, last, dtype=np.int64))

    def shard(self, step: int, rank: int, world: int, micro_batch_size: int) -> list[NDArray[np.int64]]:
        """The micro-batches of one rank for a step: equally many on every rank, all of micro_batch_size samples.

        Samples go round the ranks; what does not divide is filled with PADDING (-1), a sample of weight zero.
        """
        assert 0 <= rank < world
        assert micro_batch_size >= 1
        return deal(self.indices(step), rank, world, micro_batch_size)


def sample_sums(samples: NDArray[np.int64]) -> tuple[float, float, float]:
    """Three sums over `samples` that tell which they are, whatever their order: how many, and the halves of
    splitmix64(sample), each below 2^32, so that float64 adds up two million of them exactly. Summed over the ranks
    they are the whole batch's."""
    mixed = _mix(samples.astype(np.uint64), np.uint64(0x9E3779B97F4A7C15))
    return float(len(samples)), float((mixed >> np.uint64(32)).sum()), float((mixed & np.uint64(0xFFFFFFFF)).sum())


def samples_id(count: float, high: float, low: float) -> str:
    """The record of which samples made up a step: `COUNT:HASH` of their sums over all ranks."""
    return f"{int(count)}:{int(high) % 2**32:08x}{int(low) % 2**32:08x}"


def deal(indices: NDArray[np.int64], rank: int, world: int, micro_batch_size: int) -> list[NDArray[np.int64]]:
    """Rank `rank`'s share of `indices` as equal micro-batches, padded with PADDING."""
    count = -(-len(indices) // (world * micro_batch_size))
    own = np.full(count * micro_batch_size, PADDING, dtype=np.int64)
    share = indices[rank::world]
    own[: len(share)] = share
    return list(own.reshape(count, micro_batch_size))
