"""Counted FLOPs against torch's own counter over the real model."""

from __future__ import annotations

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from lumina.config import ModelConfig
from lumina.data import Batch
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


def test_a_cpu_has_no_mfu() -> None:
    assert Utilisation(MODEL, "bf16", on_gpu=False).of([_batch([8], 4)], 1.0) is None
