"""Chunks of at most `seq_length` tokens, one after another in flat arrays: what is written to the cache and packed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


class Chunks(NamedTuple):
    """C chunks with T tokens in all.

    ids int32[T], mask uint8[T]: 1 where the token is supervised as a target; offsets int64[C+1]; conversation int64[C]:
    its index in the block; context int64[C]: how many tokens it begins with that come from earlier in the conversation;
    repeated int64[C]: how many of its tokens are counted elsewhere; messages_supervised, messages_masked int64[C]: how
    many supervised and how many other messages are counted in it.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    offsets: Int64
    conversation: Int64
    context: Int64
    repeated: Int64
    messages_supervised: Int64
    messages_masked: Int64


def ranges(starts: Int64, stops: Int64) -> Int64:
    """The indices of all [start, stop) one range after another: int64[sum of lengths]."""
    lengths = stops - starts
    first = np.cumsum(lengths) - lengths
    return np.repeat(starts - first, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def sums_between(values_T: NDArray[np.uint8], bounds: Int64) -> Int64:
    """The sums of values [bounds[i], bounds[i + 1]): int64[len(bounds) - 1]; bounds ascend from 0 to T."""
    sums = np.zeros(len(bounds) - 1, dtype=np.int64)
    filled = bounds[:-1] < bounds[1:]  # reduceat takes the value at an empty range's start
    if filled.any():
        sums[filled] = np.add.reduceat(values_T, bounds[:-1][filled], dtype=np.int64)
    return sums
