"""The unigram baseline against a hand count."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lumina.data import prepare, unigram_baseline
from tests.data.helpers import TOKENIZER, Settings, chat, write_jsonl


def test_against_a_hand_count(tmp_path: Path) -> None:
    train = prepare([write_jsonl(tmp_path / "t.jsonl", [chat("q", "a a"), chat("q", "a")])], Settings(), TOKENIZER)
    evaluation = prepare([write_jsonl(tmp_path / "e.jsonl", [chat("q", "a b")])], Settings(), TOKENIZER)
    # Supervised in train: "a" twice, " a" once, the stop token twice. In eval: "a", " b", the stop token, once each.
    total = 5 + TOKENIZER.vocab_size
    expected = -(math.log(3 / total) + math.log(1 / total) + math.log(3 / total)) / 3
    assert unigram_baseline(train, evaluation, TOKENIZER.vocab_size) == pytest.approx(expected, rel=1e-12)
