"""Unigram baseline: the loss that a model has to beat to know more than the frequencies of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lumina.data.loading.dataset import Batch, PackedDataset
from lumina.data.loading.part import Part

_AT_ONCE = 1 << 20  # tokens, whatever the length of a row


def batches_of(dataset: PackedDataset, most: int = _AT_ONCE) -> Iterator[Batch]:
    """All tokens of a data set in order, at most some `most` at a time: several samples, or part of one."""
    ends = np.cumsum(dataset.tokens_per_sample, dtype=np.int64)
    first = done = 0
    while first < dataset.num_samples:
        last = int(np.searchsorted(ends, done + most, side="right"))
        if last > first:
            yield dataset.batch(range(first, last))
        else:
            last = first + 1
            pieces = -(-int(dataset.tokens_per_sample[first]) // most)
            yield from (dataset.batch([first], Part(at, pieces)) for at in range(pieces))
        first, done = last, int(ends[last - 1])


def supervised_counts(dataset: PackedDataset, vocab_size: int) -> NDArray[np.int64]:
    """How often each id is a supervised target in an epoch: int64[vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in batches_of(dataset):
        counts += np.bincount(batch.targets_T[batch.weights_T > 0], minlength=vocab_size)
    return counts


def unigram_baseline(train: PackedDataset, evaluation: PackedDataset, vocab_size: int) -> float:
    """Cross-entropy in nats per supervised token of `evaluation` under the add-one-smoothed unigram distribution of
    `train`'s supervised tokens over `vocab_size` ids."""
    smoothed = supervised_counts(train, vocab_size) + 1
    log_p = np.log(smoothed) - np.log(smoothed.sum())
    counts = supervised_counts(evaluation, vocab_size)
    return float(-(counts * log_p).sum() / counts.sum())
