"""Host memory of a rank, counted again from a model's own parameters."""

from __future__ import annotations

import pytest
import torch

from lumina.config import ModelConfig
from lumina.model import Transformer
from lumina.plan.costs import host_memory
from lumina.plan.costs.setup import Setup

# The shape of Llama 3 70B.
SEVENTY = ModelConfig(
    hidden_size=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    intermediate_size=28672,
    vocab_size=128_256,
    seq_length=8192,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(("precision", "cast"), [("bf16", 2), ("fp32", 0)])
def test_a_large_model_starts_on_eight_cards(precision: str, cast: int) -> None:
    with torch.device("meta"):
        counts = [p.numel() for p in Transformer(SEVENTY).parameters()]
    total, largest = sum(counts), max(counts)
    assert total == SEVENTY.num_parameters()
    setups = {stage: Setup(1, 1, 8, precision, stage=stage) for stage in (2, 3)}
    assert host_memory.start(SEVENTY, setups[2]) == 4 * total + cast * largest
    assert host_memory.start(SEVENTY, setups[3]) == max((4 + cast) * largest, (cast or 4) * -(-total // 8))
    assert host_memory.start(SEVENTY, setups[3]) < host_memory.start(SEVENTY, setups[2]) / 7
    assert host_memory.snapshot(SEVENTY, setups[3]) == pytest.approx(12 * total / 8)
