"""Chunks of at most `seq_length` tokens, one after another in flat arrays: what is written to the cache and packed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


class Chunks(NamedTuple):
    """C chunks with T tokens in all.

    ids int32[T], mask uint8[T]: 1 where the token is supervised as a target; offsets int64[C+1]; conversation int64[C]:
    its index in the block; context bool[C]: whether the first token repeats the last one of the chunk before;
    messages_supervised, messages_masked int64[C]: how many supervised and how many other messages begin in it.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    offsets: Int64
    conversation: Int64
    context: NDArray[np.bool_]
    messages_supervised: Int64
    messages_masked: Int64


def ranges(starts: Int64, stops: Int64) -> Int64:
    """The indices of all [start, stop) one range after another: int64[sum of lengths]."""
    lengths = stops - starts
    first = np.cumsum(lengths) - lengths
    return np.repeat(starts - first, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)
