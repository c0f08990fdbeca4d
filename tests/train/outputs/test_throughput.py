"""Counted FLOPs against torch's own counter over the real model."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from lumina.config import ModelConfig
from lumina.data import Batch, Part
from lumina.data.loading.dataset import join
from lumina.model import Transformer
from lumina.train.outputs.throughput import Utilisation, step_flops

MODEL = ModelConfig(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, seq_length=64, vocab_size=512)


def _batch(lengths: list[int], supervised: int) -> Batch:
    total = sum(lengths)
    weights = np.zeros(total, dtype=np.float32)
    weights[:supervised] = 1.0
    positions = np.concatenate([np.arange(n) for n in lengths])
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.arange(total, dtype=np.int64) % MODEL.vocab_size
    return Batch(ids, ids, weights, positions, bounds, max(lengths))


def test_step_flops_equal_torchs_count_of_matrix_products() -> None:
    # 64 supervised: a whole tile of rows. Rows that only fill a tile are not the model's work and are not counted.
    batch = _batch([40, 7, 33], supervised=64)
    given = batch.torch()
    assert len(given.ids_T) == 128, "rows that fill a tile"
    edges, row = given.cu_seqlens_D[:-1], slice(80)
    model = Transformer(MODEL)
    with FlopCounterMode(display=False) as counter:
        ids, positions = given.ids_T[None, row], given.positions_T[None, row]
        supervised = {"supervised_N": given.supervised_N}
        loss = model(ids, positions, edges, given.max_seqlen, given.targets_N, given.weights_N, **supervised)
        loss.backward()
    products = sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm")
    )
    keys = sum(n * (n + 1) / 2 for n in (40, 7, 33))  # the counter sees attention as one operator: done by hand
    attention = 3 * 4 * MODEL.num_layers * MODEL.hidden_size * keys
    assert step_flops(MODEL, [batch]) == products + attention


@pytest.mark.parametrize("count", [2, 3])
def test_parts_have_the_rows_work_between_them(count: int) -> None:
    """Ranks that share rows: MFU counts no token of them twice, nor a supervised one."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(1, 100, length).astype(np.int32) for length in (140, 7, 200)]
    masks = [(draw.random(len(one)) < 0.3).astype(np.uint8) for one in ids]
    parts = [step_flops(MODEL, [join(ids, masks, Part(index, count))]) for index in range(count)]
    assert sum(parts) == pytest.approx(step_flops(MODEL, [join(ids, masks)]), rel=1e-12)
    assert all(part > 0 for part in parts)


def test_a_cpu_has_no_mfu() -> None:
    assert Utilisation("bf16", on_gpu=False).of(1e12, 1.0) is None
