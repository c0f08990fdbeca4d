"""Data mixing: how often an epoch takes each conversation of sources with weights.

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
    file_C: NDArray[np.int64], task_C: NDArray[np.int64], line_C: NDArray[np.int64], weights: Sequence[float]
) -> NDArray[np.int64]:
    """How often an epoch takes each chunk: int64[C]. Chunks of one record (a task's line) go together.

    Args:
        file_C, task_C, line_C: each chunk's file, task and line within the task.
        weights: of each file, at least 0.
    """
    out_C = np.zeros(len(file_C), dtype=np.int64)
    for number, weight in enumerate(weights):
        own = np.flatnonzero(file_C == number)
        if not len(own):
            continue
        _, record_of = np.unique(np.stack([task_C[own], line_C[own]]), axis=1, return_inverse=True)
        records = int(record_of.max()) + 1
        whole = int(weight)
        times = np.full(records, whole, dtype=np.int64)
        extra = round((weight - whole) * records)
        times[Permutation(records, b"lumina mixing")(np.arange(extra))] += 1
        out_C[own] = times[record_of]
    return out_C


def shares(
    names: Sequence[str],
    weights: Sequence[float],
    file_C: NDArray[np.int64],
    repeats_C: NDArray[np.int64],
    supervised_C: NDArray[np.int32],
) -> list[str]:
    """A line for each source: its weight and its realised share of an epoch's supervised tokens."""
    supervised = np.bincount(file_C, weights=repeats_C * supervised_C, minlength=len(names))
    total = max(1.0, float(supervised.sum()))
    return [
        f"{name}: weight {weight:g}, {tokens:,.0f} supervised tokens an epoch, {100 * tokens / total:.2f}%"
        for name, weight, tokens in zip(names, weights, supervised.tolist(), strict=True)
    ]
