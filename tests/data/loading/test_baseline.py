"""The unigram baseline against a hand count."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lumina.data import prepare, unigram_baseline
from lumina.data.loading.baseline import batches_of, supervised_counts
from tests.data.helpers import TOKENIZER, Settings, chat, write_jsonl


def test_against_a_hand_count(tmp_path: Path) -> None:
    train = prepare([write_jsonl(tmp_path / "t.jsonl", [chat("q", "a a"), chat("q", "a")])], Settings(), TOKENIZER)
    evaluation = prepare([write_jsonl(tmp_path / "e.jsonl", [chat("q", "a b")])], Settings(), TOKENIZER)
    # Supervised in train: "a" twice, " a" once, the stop token twice. In eval: "a", " b", the stop token, once each.
    total = 5 + TOKENIZER.vocab_size
    expected = -(math.log(3 / total) + math.log(1 / total) + math.log(3 / total)) / 3
    assert unigram_baseline(train, evaluation, TOKENIZER.vocab_size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("most", [64, 100, 1 << 20])
def test_a_bounded_number_of_tokens_at_a_time(tmp_path: Path, most: int) -> None:
    """Rows longer than that are read in parts, shorter ones together; each token once."""
    lines = [chat("question", " ".join(["word"] * length)) for length in (3, 5, 300, 40, 7, 9, 150, 2)]
    dataset = prepare([write_jsonl(tmp_path / "in.jsonl", lines)], Settings(packing=False, seq_length=1024), TOKENIZER)
    batches = list(batches_of(dataset, most))
    whole = dataset.batch(range(dataset.num_samples))
    for name in ("ids_T", "targets_T", "weights_T"):
        assert np.concatenate([getattr(batch, name) for batch in batches]).tolist() == getattr(whole, name).tolist()
    assert max(len(batch.ids_T) for batch in batches) <= max(most, 128)  # parts are whole tiles
    counts = supervised_counts(dataset, TOKENIZER.vocab_size)
    supervised = [id for chunk in map(dataset.chunks_of, range(8)) for id in chunk[0].ids[chunk[0].mask > 0].tolist()]
    assert counts.tolist() == np.bincount(supervised, minlength=TOKENIZER.vocab_size).tolist()
    lengths = [dataset.document_lengths(sample).tolist() for sample in range(8)]
    assert lengths == [[len(chunk.ids) for chunk in dataset.chunks_of(sample)] for sample in range(8)]
