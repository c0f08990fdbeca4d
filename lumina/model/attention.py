"""Causal attention over documents laid end to end: each query sees its own document's past and nothing else.

Four ways, one result: flash-attn's variable-length kernel where it is installed and the GPU has it; torch's own
variable-length kernel on a GPU in half precision; blocks of matrix products on a CPU in bfloat16; and
scaled-dot-product attention document by document everywhere else, which is also the reference.

Shape suffixes as in transformer.py; R rows of one key/value head's queries (positions x group), n keys.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.model import cpu


@dataclass(frozen=True)
class Documents:
    """Where documents meet. `cu_seqlens` are their edges over the S tokens of a single row, where the row is, for the
    variable-length kernels; None: each row is one document. `bounds` is the same on the host, for the other ways: None
    where nobody said so, since asking the device for it would make the host wait for all that it has to do."""

    bounds: tuple[int, ...] | None
    cu_seqlens: Tensor | None
    max_seqlen: int

    @classmethod
    def of(
        cls,
        ids_BS: Tensor,
        cu_seqlens_D: Tensor | None,
        max_seqlen: int | None,
        bounds: tuple[int, ...] | None = None,
    ) -> Documents:
        if cu_seqlens_D is None:
            return cls(None, None, ids_BS.shape[1])
        assert ids_BS.shape[0] == 1, "documents are laid end to end in one row"
        if cu_seqlens_D.device.type == "cpu" and bounds is None:
            bounds = tuple(cu_seqlens_D.tolist())
        if max_seqlen is None:
            assert bounds is not None, "on a device, the longest document or the bounds are given"
            max_seqlen = max(end - start for start, end in itertools.pairwise(bounds))
        return cls(bounds, cu_seqlens_D, max_seqlen)

    def edges(self) -> Iterator[tuple[int, int]]:
        """(start, end) of each document of a single row."""
        assert self.bounds is not None, "without a variable-length kernel the host must know the documents' bounds"
        return itertools.pairwise(self.bounds)


def attention(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, docs: Documents | None) -> Tensor:
    """softmax(q k^T / sqrt(d), causal, within documents) v: (B, S, H, d), in q's dtype, softmax in float32."""
    if docs is None or docs.cu_seqlens is None:
        if q_BSHd.shape[0] == 1 and _blockwise(q_BSHd):
            return _cpu_attention(q_BSHd[0], k_BSKd[0], v_BSKd[0])[None]
        return _sdpa(q_BSHd, k_BSKd, v_BSKd)
    varlen = _varlen_kernel(q_BSHd.dtype) if q_BSHd.device.type == "cuda" else None
    if varlen is not None:
        return varlen(q_BSHd[0], k_BSKd[0], v_BSKd[0], docs)[None]
    pieces = []
    for start, end in docs.edges():
        q, k, v = (x[:, start:end] for x in (q_BSHd, k_BSKd, v_BSKd))
        pieces.append(_cpu_attention(q[0], k[0], v[0])[None] if _blockwise(q) else _sdpa(q, k, v))
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _sdpa(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BSKd, v_BSKd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@functools.cache
def _varlen_kernel(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, Documents], Tensor] | None:
    """A GPU kernel for documents of different lengths, or None: half precision on compute capability 8.0 and later."""
    if dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return _torch_varlen()

    def flash(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
        cu, longest = docs.cu_seqlens, docs.max_seqlen
        options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
        out: Any = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, **options)
        return out  # type: ignore[no-any-return]

    return flash


def _torch_varlen() -> Callable[[Tensor, Tensor, Tensor, Documents], Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # The mask is a window that ends at the query since torch 2.12, a flag before.
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = "enable_gqa" in known

    def own(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1 and not grouped:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        options = causal | ({"enable_gqa": group > 1} if grouped else {})
        cu, longest = docs.cu_seqlens, docs.max_seqlen
        assert cu is not None
        out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
        return out  # type: ignore[no-any-return]

    return own


# --- CPU, bfloat16 --------------------------------------------------------------------------------
# torch's CPU flash attention took 14 ms forward and backward for one document of 512 tokens (8/2 heads of 64, two
# cores); the same work as plain matrix products over blocks of queries takes 8: they run at the machine's full rate,
# and folding the heads of a group into rows saves repeating the keys. Probabilities are rebuilt in the backward pass.

_LENGTH_TILE = 32
_QUERY_BLOCK = 256  # queries at a time; keys beyond a block's last query are never touched


def _blockwise(q: Tensor) -> bool:
    return cpu.usable(q)


def _fold(x_SHd: Tensor, kv_heads: int) -> Tensor:
    """(S, H, d) -> (K, S * H/K, d): the queries of one key/value head as rows, position-major."""
    length, heads, width = x_SHd.shape
    grouped = x_SHd.reshape(length, kv_heads, heads // kv_heads, width).transpose(0, 1)
    return grouped.reshape(kv_heads, -1, width)


def _unfold(x_KRd: Tensor, length: int) -> Tensor:
    """The inverse of `_fold`."""
    kv_heads, rows, width = x_KRd.shape
    return x_KRd.view(kv_heads, length, rows // length, width).transpose(0, 1).reshape(length, -1, width)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_SHd: Tensor, k_SKd: Tensor, v_SKd: Tensor) -> Tensor:
        length, heads, width = q_SHd.shape
        kv_heads = k_SKd.shape[1]
        group, scale = heads // kv_heads, width**-0.5
        q_KRd = _fold(q_SHd, kv_heads)
        k_Ksd, v_Ksd = k_SKd.transpose(0, 1).contiguous(), v_SKd.transpose(0, 1).contiguous()
        o_KRd = torch.empty_like(q_KRd)
        blocks_lse = []
        for start in range(0, length, _QUERY_BLOCK):
            end = min(start + _QUERY_BLOCK, length)
            rows = slice(start * group, end * group)
            p_KRn = torch.bmm(q_KRd[:, rows], k_Ksd[:, :end].mT)
            lse_KR = torch.empty(p_KRn.shape[:2], dtype=torch.float32)
            cpu.call("lumina_causal_softmax", p_KRn, lse_KR, *p_KRn.shape, group, start, scale, 0)
            o_KRd[:, rows] = torch.bmm(p_KRn, v_Ksd[:, :end])
            blocks_lse.append(lse_KR)
        ctx.save_for_backward(q_KRd, k_Ksd, v_Ksd, *blocks_lse)
        return _unfold(o_KRd, length)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_KRd, k_Ksd, v_Ksd, *blocks_lse = ctx.saved_tensors
        kv_heads, length, width = k_Ksd.shape
        group, scale = q_KRd.shape[1] // length, width**-0.5
        do_KRd = _fold(grads[0], kv_heads)
        dq_KRd = torch.empty_like(q_KRd)
        dk_Ksd = torch.zeros(k_Ksd.shape, dtype=torch.float32)
        dv_Ksd = torch.zeros(v_Ksd.shape, dtype=torch.float32)
        for lse_KR, start in zip(blocks_lse, range(0, length, _QUERY_BLOCK), strict=True):
            end = min(start + _QUERY_BLOCK, length)
            rows = slice(start * group, end * group)
            q, do = q_KRd[:, rows], do_KRd[:, rows]
            p_KRn = torch.bmm(q, k_Ksd[:, :end].mT)
            cpu.call("lumina_causal_softmax", p_KRn, lse_KR, *p_KRn.shape, group, start, scale, 1)
            dv_Ksd[:, :end] += torch.bmm(p_KRn.mT, do)
            ds_KRn = torch.bmm(do, v_Ksd[:, :end].mT)
            cpu.call("lumina_softmax_backward", ds_KRn, p_KRn, lse_KR.numel(), end, scale)
            dq_KRd[:, rows] = torch.bmm(ds_KRn, k_Ksd[:, :end])
            dk_Ksd[:, :end] += torch.bmm(ds_KRn.mT, q)
        dtype = q_KRd.dtype
        return _unfold(dq_KRd, length), dk_Ksd.to(dtype).transpose(0, 1), dv_Ksd.to(dtype).transpose(0, 1)


def _cpu_attention(q_SHd: Tensor, k_SKd: Tensor, v_SKd: Tensor) -> Tensor:
    # Lengths in whole tiles: oneDNN keeps code for every shape. What is padded comes after every real query, so
    # causality hides it, and the padded queries' rows are cut off again.
    length = q_SHd.shape[0]
    extra = -length % _LENGTH_TILE
    if extra:
        q_SHd, k_SKd, v_SKd = (F.pad(x, (0, 0, 0, 0, 0, extra)) for x in (q_SHd, k_SKd, v_SKd))
    out_SHd: Tensor = _CpuAttention.apply(q_SHd, k_SKd, v_SKd)  # type: ignore[no-untyped-call]
    return out_SHd[:length]
