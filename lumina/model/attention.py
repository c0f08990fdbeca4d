"""Causal attention over documents laid end to end: each query sees its own document's past and nothing else.

Four ways, one result: a variable-length kernel on a GPU in half precision (varlen.py says which); scaled-dot-product
attention over documents of like lengths on a GPU that has none; blocks of matrix products on a CPU in bfloat16; and
scaled-dot-product attention document by document everywhere else, which is also the reference. All take sliding windows
and any scale. Scores with a soft cap are computed as they are written down, (S, S) of a document at a time: no kernel
that is relied on here has it.

Shape suffixes as in transformer.py; R rows of one key/value head's queries (positions x group), n keys.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lumina.config import UserError
from lumina.model import cpu
from lumina.model.parallel.sequence import SequenceGroup
from lumina.model.varlen import Kernel, find


@dataclass(frozen=True)
class Scoring:
    """Which keys a query sees, and what becomes of q k^T. window: so many keys at most, its own the last
    (arXiv:2004.05150); None: all of its document's past. scale: its factor; None: 1 / sqrt(d). softcap: the scores are
    then cap * tanh(score / cap) (arXiv:2408.00118, section 2)."""

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


PLAIN = Scoring()


@dataclass(frozen=True)
class Documents:
    """Document boundaries. `cu_seqlens` are their edges over the S tokens of a single row, where the row is, for the
    variable-length kernels; None: each row is one document. `bounds` is the same on the host, for the other ways: None
    where nobody said so, since asking the device for it would make the host wait for all that it has to do. sequence:
    the ranks that share the row's tokens, None where this one has them all."""

    bounds: tuple[int, ...] | None
    cu_seqlens: Tensor | None
    max_seqlen: int
    sequence: SequenceGroup | None = None
    _groups: list[tuple[list[Tensor], Tensor]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        ids_BS: Tensor,
        cu_seqlens_D: Tensor | None,
        max_seqlen: int | None,
        bounds: tuple[int, ...] | None = None,
        sequence: SequenceGroup | None = None,
    ) -> Documents:
        if cu_seqlens_D is None:  # whole rows, which this rank has for itself: shared ones come with their documents
            return cls(None, None, ids_BS.shape[1])
        assert ids_BS.shape[0] == 1, "documents are laid end to end in one row"
        if cu_seqlens_D.device.type == "cpu" and bounds is None:
            bounds = tuple(cu_seqlens_D.tolist())
        if max_seqlen is None:
            assert bounds is not None, "on a device, the longest document or the bounds are given"
            max_seqlen = max(end - start for start, end in itertools.pairwise(bounds))
        return cls(bounds, cu_seqlens_D, max_seqlen, sequence)

    def host_bounds(self) -> tuple[int, ...]:
        """The documents' edges over a single row, where something has said them."""
        assert self.bounds is not None, "without a variable-length kernel the host must know the documents' bounds"
        return self.bounds

    def edges(self) -> Iterator[tuple[int, int]]:
        """(start, end) of each document of a single row."""
        return itertools.pairwise(self.host_bounds())

    def groups(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Documents whose lengths have the same power of two above them, as (n, L) of their tokens' places, filled up
        with place 0, L the longest of them; and for each of the S tokens where it is in all groups end to end, int64.
        Made once, by the first layer."""
        if not self._groups:
            self._groups.append(self._group(device))
        return self._groups[0]

    def _group(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        alike: dict[int, list[tuple[int, int]]] = {}
        for start, end in self.edges():
            alike.setdefault((end - start - 1).bit_length(), []).append((start, end))
        groups, back, first = [], np.empty(max(end for _, end in self.edges()), dtype=np.int64), 0
        for members in alike.values():
            longest = max(end - start for start, end in members)
            rows_nL = np.zeros((len(members), longest), dtype=np.int64)
            for row, (start, end) in zip(rows_nL, members, strict=True):
                row[: end - start] = np.arange(start, end)
                back[start:end] = np.arange(first, first + end - start)
                first += longest
            groups.append(_sent(rows_nL, device))
        return groups, _sent(back, device)


def _sent(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """The array on a device; the host does not wait for it: from pageable memory it would."""
    host = torch.from_numpy(array)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def attention(
    q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, docs: Documents | None, scoring: Scoring = PLAIN
) -> Tensor:
    """softmax(scores of q k^T, causal, within documents) v: (B, S, H, d), in q's dtype, softmax in float32. Where ranks
    share the row, S are this one's tokens; collective then."""
    if docs is not None and docs.sequence is not None:
        return docs.sequence.attend(
            partial(attention, docs=replace(docs, sequence=None), scoring=scoring), q_BSHd, k_BSKd, v_BSKd
        )
    if docs is not None and docs.cu_seqlens is not None:
        on_gpu = q_BSHd.device.type == "cuda"
        varlen = _varlen_kernel(q_BSHd.dtype) if on_gpu and scoring.softcap is None else None
        if varlen is not None:
            packed = q_BSHd[0], k_BSKd[0], v_BSKd[0], docs.cu_seqlens, docs.max_seqlen
            return varlen.attend(*packed, scoring.window, scoring.scale)[None]
        return _by_document(q_BSHd, k_BSKd, v_BSKd, docs, scoring)
    if q_BSHd.shape[0] == 1 and _blockwise(q_BSHd, scoring):
        return _cpu_attention(q_BSHd, k_BSKd, v_BSKd, (0, q_BSHd.shape[1]), scoring)
    return _sdpa(q_BSHd, k_BSKd, v_BSKd, scoring)


def _by_document(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, docs: Documents, scoring: Scoring) -> Tensor:
    if q_BSHd.device.type == "cuda":
        return _by_length(q_BSHd, k_BSKd, v_BSKd, docs, scoring)
    if _blockwise(q_BSHd, scoring):
        return _cpu_attention(q_BSHd, k_BSKd, v_BSKd, docs.host_bounds(), scoring)
    # Not slices: the gradient of each would be a whole row of zeros but for its own, and documents are many.
    lengths = [end - start for start, end in docs.edges()]
    split = (torch.split(x, lengths, 1) for x in (q_BSHd, k_BSKd, v_BSKd))
    pieces = [_sdpa(q, k, v, scoring) for q, k, v in zip(*split, strict=True)]
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _by_length(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, docs: Documents, scoring: Scoring) -> Tensor:
    """For GPUs without a variable-length kernel: documents of like lengths at once, filled up to the longest of them.
    What fills up comes after every real query, so causality hides it. A call for each document would be hundreds a
    layer where documents are short; these are at most one for each power of two, over twice the tokens at most."""
    groups, back_S = docs.groups(q_BSHd.device)
    parts = []
    for rows_nL in groups:
        rows, shape = rows_nL.flatten(), rows_nL.shape
        q, k, v = (x[0].index_select(0, rows).view(*shape, *x.shape[2:]) for x in (q_BSHd, k_BSKd, v_BSKd))
        parts.append(_sdpa(q, k, v, scoring).flatten(0, 1))
    return torch.cat(parts).index_select(0, back_S)[None]


def _sdpa(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, scoring: Scoring) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BSKd, v_BSKd))
    seen_SS = None
    if scoring.softcap is not None or (scoring.window is not None and scoring.window < q.shape[2]):
        seen_SS = seen(q.shape[2], q.shape[2], scoring.window, q.device)
    return grouped_sdpa(q, k, v, seen_SS, causal=seen_SS is None, scoring=scoring).transpose(1, 2)


def seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which of n keys the newest S positions see, each its own and those before it: bool (S, n)."""
    past_Sn = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return past_Sn if window is None else past_Sn.triu(keys - queries - window + 1)


def grouped_sdpa(
    q_BHSd: Tensor,
    k_BKnd: Tensor,
    v_BKnd: Tensor,
    seen: Tensor | None,
    causal: bool = False,
    scoring: Scoring = PLAIN,
) -> Tensor:
    """Scaled-dot-product attention in which each key/value head serves H / K query heads. `seen`: a mask, or None; of a
    `scoring` only scale and cap are looked at.

    On a GPU only the flash kernel takes fewer key/value heads than query heads (torch's sdp_utils_cpp.h and
    cuda/sdp_utils.cpp: check_batch_size_and_num_heads_dense), and it takes neither float32, nor a mask, nor cards
    before compute capability 8.0. Everything else would fall back to the plain way, whose scores are O(S^2) memory: so
    the heads are repeated there, and the memory-efficient kernel takes them."""
    if scoring.softcap is not None:
        assert not causal, "a mask says what is seen"
        return _capped(q_BHSd, k_BKnd, v_BKnd, seen, scoring.scale, scoring.softcap)
    group = q_BHSd.shape[1] // k_BKnd.shape[1]
    if group > 1 and q_BHSd.device.type == "cuda" and not (seen is None and _flash_takes(q_BHSd.dtype)):
        k_BKnd, v_BKnd, group = k_BKnd.repeat_interleave(group, 1), v_BKnd.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(
        q_BHSd, k_BKnd, v_BKnd, attn_mask=seen, is_causal=causal, enable_gqa=group > 1, scale=scoring.scale
    )


def _capped(
    q_BHSd: Tensor, k_BKnd: Tensor, v_BKnd: Tensor, seen: Tensor | None, scale: float | None, cap: float
) -> Tensor:
    """Attention with a soft cap; the scores exist, in float32, and autograd keeps them."""
    batch, _, length, width = q_BHSd.shape
    q_BKgSd = q_BHSd.reshape(batch, k_BKnd.shape[1], -1, length, width)
    s_BKgSn = (q_BKgSd @ k_BKnd[:, :, None].mT) * (width**-0.5 if scale is None else scale)
    s_BKgSn = cap * torch.tanh(s_BKgSn.to(torch.promote_types(s_BKgSn.dtype, torch.float32)) / cap)
    if seen is not None:
        seen = seen if seen.ndim == 2 else seen[:, :, None]
        s_BKgSn = s_BKgSn.masked_fill(~seen, -torch.inf) if seen.dtype is torch.bool else s_BKgSn + seen
    return (s_BKgSn.softmax(-1).to(v_BKnd.dtype) @ v_BKnd[:, :, None]).flatten(1, 2)


def _flash_takes(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability() >= (8, 0)


_varlen_kernels: dict[torch.dtype, Kernel | None] = {}


def _varlen_kernel(dtype: torch.dtype) -> Kernel | None:
    """The GPU kernel for documents of different lengths, or None; chosen once for each type."""
    if dtype not in _varlen_kernels:
        _varlen_kernels[dtype] = find(dtype)
    return _varlen_kernels[dtype]


def bind() -> None:
    """Before torch.compile: choose the variable-length kernels now, not in a traced function, where the search breaks
    the graph, and keep the way document by document out of graphs: each batch's bounds would make other ones."""
    global _by_document
    if not hasattr(_by_document, "_torchdynamo_disable"):
        _by_document = torch.compiler.disable(_by_document)  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        _varlen_kernel(torch.bfloat16)
        _varlen_kernel(torch.float16)
        with contextlib.suppress(UserError):  # float32 has none; one that is forced is refused where it is asked for
            _varlen_kernel(torch.float32)


def report_kernel(device: torch.device, precision: str, softcap: float | None = None) -> list[str]:
    """What attends over documents on this process's GPU, for a run's first lines, and none for a CPU; chooses it.
    softcap: that of the model's scores. UserError as in varlen.find."""
    if device.type != "cuda":
        return []
    kernel = _varlen_kernel({"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))
    if softcap is not None:
        return ["attention: the scores of each document at once, for their soft cap (attention_softcap)"]
    other = "torch's scaled-dot-product attention over documents of like lengths"
    return [f"attention: {other if kernel is None else kernel.name}"]


def refuse_cudnn() -> None:
    """No cuDNN attention: torch prefers it on Hopper and Blackwell, and it plans every exact shape anew. Lengths differ
    from batch to batch, and in decoding from token to token, where that took 23 to 37 ms each by public reports."""
    torch.backends.cuda.enable_cudnn_sdp(False)


# --- CPU, bfloat16 --------------------------------------------------------------------------------
# torch's CPU flash attention took 14 ms forward and backward for one document of 512 tokens (8/2 heads of 64, two
# cores); the same work as plain matrix products over blocks of queries takes 8: they run at the machine's full rate,
# and folding the heads of a group into rows saves repeating the keys. Probabilities are rebuilt in the backward pass.

_LENGTH_TILE = 32
_QUERY_BLOCK = 256  # queries at a time; keys beyond a block's last query are never touched


def _blockwise(q: Tensor, scoring: Scoring) -> bool:
    return scoring.softcap is None and cpu.usable(q)


def _fold(x_Snd: Tensor, kv_heads: int) -> Tensor:
    """(S, n, d) -> (K, R * n/K, d): the rows of one key/value head's queries, or its keys, position-major. R is S in
    whole tiles: oneDNN keeps code for every shape. What is padded comes after every real query: causality hides it."""
    extra = -len(x_Snd) % _LENGTH_TILE
    if extra:
        x_Snd = F.pad(x_Snd, (0, 0, 0, 0, 0, extra))
    length, heads, width = x_Snd.shape
    grouped = x_Snd.reshape(length, kv_heads, heads // kv_heads, width).transpose(0, 1)
    return grouped.reshape(kv_heads, -1, width)


def _unfold(x_KRd: Tensor, heads: int, length: int) -> Tensor:
    """The inverse of `_fold`: (S, n, d), without what was padded."""
    kv_heads, _, width = x_KRd.shape
    grouped = x_KRd.view(kv_heads, -1, heads // kv_heads, width)
    return grouped[:, :length].transpose(0, 1).reshape(length, heads, width)


class _CpuAttention(torch.autograd.Function):
    """Documents one after another. For the backward pass it keeps its arguments, where they lie, and a log-sum per head
    and position, as the kernels of GPUs do; copies are of one document at a time."""

    @staticmethod
    def forward(
        ctx: Any, q_SHd: Tensor, k_SKd: Tensor, v_SKd: Tensor, bounds: tuple[int, ...], window: int | None, scale: float
    ) -> Tensor:
        heads, kv_heads = q_SHd.shape[1], k_SKd.shape[1]
        group = heads // kv_heads
        o_SHd = torch.empty(q_SHd.shape, dtype=q_SHd.dtype)
        blocks_lse = []
        for start, end in itertools.pairwise(bounds):
            q_KRd, k_Ksd, v_Ksd = (_fold(x[start:end], kv_heads) for x in (q_SHd, k_SKd, v_SKd))
            o_KRd = torch.empty_like(q_KRd)
            for first, keys, rows, seen in _blocks(k_Ksd.shape[1], group, window):
                p_KRn = torch.bmm(q_KRd[:, rows], k_Ksd[:, keys].mT)
                lse_KR = torch.empty(p_KRn.shape[:2], dtype=torch.float32)
                cpu.call("lumina_causal_softmax", p_KRn, lse_KR, *p_KRn.shape, group, first, seen, scale, 0)
                o_KRd[:, rows] = torch.bmm(p_KRn, v_Ksd[:, keys])
                blocks_lse.append(lse_KR)
            o_SHd[start:end] = _unfold(o_KRd, heads, end - start)
        ctx.save_for_backward(q_SHd, k_SKd, v_SKd, *blocks_lse)
        ctx.bounds, ctx.window, ctx.scale = bounds, window, scale
        return o_SHd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_SHd, k_SKd, v_SKd, *blocks_lse = ctx.saved_tensors
        heads, kv_heads, scale = q_SHd.shape[1], k_SKd.shape[1], ctx.scale
        group, left = heads // kv_heads, iter(blocks_lse)
        dq_SHd, dk_SKd, dv_SKd = (torch.empty(x.shape, dtype=x.dtype) for x in (q_SHd, k_SKd, v_SKd))
        for start, end in itertools.pairwise(ctx.bounds):
            q_KRd, k_Ksd, v_Ksd, do_KRd = (_fold(x[start:end], kv_heads) for x in (q_SHd, k_SKd, v_SKd, grads[0]))
            dq_KRd = torch.empty_like(q_KRd)
            dk_Ksd, dv_Ksd = (torch.zeros(x.shape, dtype=torch.float32) for x in (k_Ksd, v_Ksd))
            for first, keys, rows, seen in _blocks(k_Ksd.shape[1], group, ctx.window):
                q, do, lse_KR = q_KRd[:, rows], do_KRd[:, rows], next(left)
                p_KRn = torch.bmm(q, k_Ksd[:, keys].mT)
                cpu.call("lumina_causal_softmax", p_KRn, lse_KR, *p_KRn.shape, group, first, seen, scale, 1)
                dv_Ksd[:, keys] += torch.bmm(p_KRn.mT, do)
                ds_KRn = torch.bmm(do, v_Ksd[:, keys].mT)
                cpu.call("lumina_softmax_backward", ds_KRn, p_KRn, lse_KR.numel(), keys.stop - keys.start, scale)
                dq_KRd[:, rows] = torch.bmm(ds_KRn, k_Ksd[:, keys])
                dk_Ksd[:, keys] += torch.bmm(ds_KRn.mT, q)
            dq_SHd[start:end] = _unfold(dq_KRd, heads, end - start)
            dk_SKd[start:end], dv_SKd[start:end] = (_unfold(x, kv_heads, end - start) for x in (dk_Ksd, dv_Ksd))
        return dq_SHd, dk_SKd, dv_SKd, None, None, None


def _blocks(length: int, group: int, window: int | None) -> Iterator[tuple[int, slice, slice, int]]:
    """Blocks of queries: the first one's place among the keys that any of them sees, these keys, the queries' rows of a
    head, and how many keys a query sees at most."""
    seen = length if window is None else window
    for start in range(0, length, _QUERY_BLOCK):
        end, key = min(start + _QUERY_BLOCK, length), max(0, start - seen + 1)
        yield start - key, slice(key, end), slice(start * group, end * group), seen


def _cpu_attention(q_1SHd: Tensor, k_1SKd: Tensor, v_1SKd: Tensor, bounds: tuple[int, ...], scoring: Scoring) -> Tensor:
    assert bounds[-1] == q_1SHd.shape[1], "every token is in a document"
    scale = q_1SHd.shape[3] ** -0.5 if scoring.scale is None else scoring.scale
    given = q_1SHd[0], k_1SKd[0], v_1SKd[0], bounds, scoring.window, scale
    out_SHd: Tensor = _CpuAttention.apply(*given)  # type: ignore[no-untyped-call]
    return out_SHd[None]
