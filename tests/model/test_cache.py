"""Decoding rows of different lengths by a kernel that takes their spans, by a stand-in for it: no card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lumina.model import cache as room
from lumina.model.cache import KVCache
from lumina.model.varlen import Spans
from tests.model.tiny_models import make_model
from tests.model.variable_length import by_spans

WINDOWS = {"family": "qwen3", "sliding_window": 4, "sliding_layers": [0]}
SCALES = {"family": "granite", "attention_scale": 0.9}


@pytest.mark.parametrize("changes", [{}, WINDOWS, SCALES], ids=["plain", "windows", "scales"])
@torch.no_grad()
def test_rows_of_different_lengths_by_their_spans(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole pass's logits, from a cache whose memory is the kernel's layout; no mask, no copy of the cache."""
    calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None) -> Tensor:
        assert k.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr(), "the cache itself"
        calls.append(spans.used.tolist())
        assert spans.longest == int(spans.used.max())
        return by_spans(q, k, v, spans, scale)

    monkeypatch.setattr(room, "_token_major", lambda device: True)
    monkeypatch.setattr(room, "spans_kernel", lambda dtype: attend)
    model = make_model(dtype=torch.float64, **changes)
    texts = [torch.randint(0, 61, (length,)).tolist() for length in (9, 30, 17)]
    whole = [model(torch.tensor([ids]), torch.arange(len(ids))[None])[0] for ids in texts]
    cache = KVCache(model.config, 4, 40, model.embedding.weight)
    assert cache.keys.shape == (2, 4, 2, 40, 8)

    def check(rows: list[int], which: list[int], start: list[int], end: list[int], decode: bool = False) -> None:
        pieces = [texts[text][a:b] for text, a, b in zip(which, start, end, strict=True)]
        positions = cache.extend(rows, [len(piece) for piece in pieces], decode)
        ids = torch.tensor([token for piece in pieces for token in piece]).view(positions.shape)
        found = model(ids, positions, cache=cache)[:, 0]
        torch.testing.assert_close(found, torch.stack([whole[t][b - 1] for t, b in zip(which, end, strict=True)]))

    check([0, 2], [0, 1], [0, 0], [4, 20])
    check([0, 2], [0, 1], [4, 20], [5, 21], decode=True)
    near = changes.get("sliding_window", 99)
    assert calls == [[min(5, near), min(21, near)], [5, 21]], "in each layer"
    check([0, 2], [0, 1], [5, 21], [6, 22], decode=True)
    check([2], [1], [22], [23], decode=True)
    check([1, 3], [2, 2], [0, 0], [6, 8])
    check([0, 1, 2, 3], [0, 2, 1, 2], [6, 6, 23, 8], [7, 7, 24, 9], decode=True)
    check([3, 0], [2, 0], [9, 7], [10, 8], decode=True)  # not in ascending order: by a mask
    assert [len(call) for call in calls] == [2] * 4 + [4] * 2


def test_a_cpu_keeps_the_compiled_steps_layout() -> None:
    cache = KVCache(make_model().config, 2, 8, torch.zeros(1))
    assert cache.keys.is_contiguous()
