"""A stand-in for a GPU's variable-length kernel, query by query."""

from __future__ import annotations

import torch
from torch import Tensor

from lumina.model.varlen import Spans


def by_spans(q_RHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, spans: Spans, scale: float | None = None) -> Tensor:
    """Each query over the first `used` tokens of its span of the cache."""
    assert {x.dtype for x in (spans.queries, spans.edges, spans.used)} == {torch.int32}
    count, group = len(q_RHd), q_RHd.shape[1] // k_TKd.shape[1]
    assert spans.queries.tolist() == list(range(count + 1))
    assert spans.longest >= int(spans.used.max())
    out = []
    for row in range(count):
        start, end = int(spans.edges[row]), int(spans.edges[row + 1])
        assert int(spans.used[row]) <= end - start, "a row's tokens lie in its span"
        seen = slice(start, start + int(spans.used[row]))
        k, v = (x[seen].repeat_interleave(group, 1) for x in (k_TKd, v_TKd))
        scores = torch.einsum("hd,nhd->hn", q_RHd[row], k) * (q_RHd.shape[-1] ** -0.5 if scale is None else scale)
        out.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))
    return torch.stack(out)
