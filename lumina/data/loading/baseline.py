"""Unigram baseline: the loss that a model has to beat to know more than the frequencies of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lumina.data.loading.dataset import PackedDataset

_SAMPLES_AT_ONCE = 64


def supervised_counts(dataset: PackedDataset, vocab_size: int) -> NDArray[np.int64]:
    """How often each id is a supervised target in an epoch: int64[vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, dataset.num_samples, _SAMPLES_AT_ONCE):
        batch = dataset.batch(range(first, min(first + _SAMPLES_AT_ONCE, dataset.num_samples)))
        counts += np.bincount(batch.targets_T[batch.weights_T > 0], minlength=vocab_size)
    return counts


def unigram_baseline(train: PackedDataset, evaluation: PackedDataset, vocab_size: int) -> float:
    """Cross-entropy in nats per supervised token of `evaluation` under the add-one-smoothed unigram distribution of
    `train`'s supervised tokens over `vocab_size` ids."""
    smoothed = supervised_counts(train, vocab_size) + 1
    log_p = np.log(smoothed) - np.log(smoothed.sum())
    counts = supervised_counts(evaluation, vocab_size)
    return float(-(counts * log_p).sum() / counts.sum())
