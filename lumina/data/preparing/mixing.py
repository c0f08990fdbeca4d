"""Sources with weights: how often an epoch takes each conversation.

A source of weight 2 is taken twice an epoch, of weight 0.3 three tenths of its records, of weight 1.3 once and three
tenths of it again: of n records, round(f n) for the fraction f, chosen by the keyed permutation of the global
order, so that the count is exact and the choice the same every time. The epoch's samples hold the repeats, and the
order of samples stays a function of the step alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lumina.data.loading.order import Permutation

LEFT_OUT = "left out by its source's weight"


def repeats(
    file_P: NDArray[np.int64], task_P: NDArray[np.int64], line_P: NDArray[np.int64], weights: Sequence[float]
) -> NDArray[np.int64]:
    """How often an epoch takes each piece: int64[P]. Pieces of one record (a task's line) go together.

    Args:
        file_P, task_P, line_P: each piece's file, task and line within the task.
        weights: of each file, at least 0.
    """
    out_P = np.zeros(len(file_P), dtype=np.int64)
    for number, weight in enumerate(weights):
        own = np.flatnonzero(file_P == number)
        if not len(own):
            continue
        _, record_of = np.unique(np.stack([task_P[own], line_P[own]]), axis=1, return_inverse=True)
        records = int(record_of.max()) + 1
        whole = int(weight)
        times = np.full(records, whole, dtype=np.int64)
        extra = round((weight - whole) * records)
        times[Permutation(records, b"lumina mixing")(np.arange(extra))] += 1
        out_P[own] = times[record_of]
    return out_P


def shares(
    names: Sequence[str],
    weights: Sequence[float],
    file_P: NDArray[np.int64],
    repeats_P: NDArray[np.int64],
    supervised_P: NDArray[np.int32],
) -> list[str]:
    """A line for each source: its weight and its realised share of an epoch's learned tokens."""
    learned = np.bincount(file_P, weights=repeats_P * supervised_P, minlength=len(names))
    total = max(1.0, float(learned.sum()))
    return [
        f"{name}: weight {weight:g}, {tokens:,.0f} learned tokens an epoch, {100 * tokens / total:.2f}%"
        for name, weight, tokens in zip(names, weights, learned.tolist(), strict=True)
    ]
