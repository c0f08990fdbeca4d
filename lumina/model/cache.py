"""KV cache: the keys and values of sequences being generated, allocated once.

The cache has rows (one sequence each) of a fixed capacity. A forward pass extends some of its rows; `extend` says which
and by how much, and returns the positions of the new tokens:

- Prefill: any rows, any counts. The new tokens lie end to end in one row of ids (1, T), without padding, exactly as
  training lays out documents. Rows that were empty go through training's own attention.
- Decode: one token for each of R rows, as ids (R, 1).
- Static decode: the same for the first R rows, of which the host says no length: every shape follows from R and from
  how many tokens a row may see at most, so that a CUDA graph can hold the pass (static.py).

Rows are independent: one can be freed and filled anew while the others go on.

Shape suffixes as in transformer.py; L layers, R rows of one pass, N rows of the cache, T new tokens end to end,
C capacity in tokens, n cached tokens seen by a pass, g query heads of a key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.config import ModelConfig
from lumina.model.attention import PLAIN, Documents, Scoring, attention, grouped_sdpa, seen
from lumina.model.varlen import Spans, spans_kernel


@dataclass(frozen=True)
class _Pass:
    """What one forward pass adds: for each row, tokens [start, end)."""

    rows: list[int]
    starts: list[int]
    ends: list[int]
    decode: bool
    index_R: Tensor | None  # decode: the rows, or None when they are the first R in order
    slots_R: Tensor | None  # decode: where in its row each new token goes
    docs: Documents | None  # prefill of empty rows: training's own layout
    # Decode, by window: the tokens that each row sees, as a mask (None: all n) and where a kernel takes such as spans.
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    spans: dict[int | None, Spans] = field(default_factory=dict)
    static: bool = False  # decode: starts and ends are bounds, and only the device knows the lengths


def _token_major(device: torch.device) -> bool:
    """Whether a token's heads lie together in memory, as variable-length kernels read them; else a head's tokens do, as
    the compiled step of a CPU reads them."""
    return device.type == "cuda"


class CachedRow(NamedTuple):
    """Keys and values of the tokens of one row, a copy or a view of a cache's."""

    keys_LKnd: Tensor
    values_LKnd: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys_LKnd.nbytes + self.values_LKnd.nbytes


class KVCache:
    """Keys and values (L, N, K, C, d) of N sequences of at most C tokens, in the model's dtype.

    On a GPU they are a view of (L, N, C, K, d).
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor) -> None:
        """`like` gives dtype and device: a weight of the model."""
        layers, heads, width = config.num_layers, config.num_kv_heads, config.head_dim
        apart = _token_major(like.device)
        shape = (layers, rows, capacity, heads, width) if apart else (layers, rows, heads, capacity, width)
        # Zeros, not empty: a masked slot has weight 0, and 0 times the NaN that stray memory may hold is NaN.
        keys, values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.keys, self.values = (keys.transpose(2, 3), values.transpose(2, 3)) if apart else (keys, values)
        self._spans = spans_kernel(like.dtype) if apart else None
        self.rows, self.capacity = rows, capacity
        self.lengths = [0] * rows
        self._pass: _Pass | None = None

    @staticmethod
    def bytes_of(config: ModelConfig, rows: int, capacity: int, element_size: int) -> int:
        """Bytes that a cache takes."""
        return 2 * config.num_layers * rows * config.num_kv_heads * capacity * config.head_dim * element_size

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def free(self, row: int, keep: int = 0) -> None:
        """Forget all but the first `keep` tokens of a row."""
        assert 0 <= keep <= self.lengths[row]
        self.lengths[row] = keep

    def row_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens of a row."""
        layers, _, heads, _, width = self.keys.shape
        return 2 * layers * heads * tokens * width * self.keys.element_size()

    def view_of(self, row: int) -> CachedRow:
        """The tokens of a row where they are."""
        seen = slice(self.lengths[row])
        return CachedRow(self.keys[:, row, :, seen], self.values[:, row, :, seen])

    def copy_of(self, row: int) -> CachedRow:
        """A copy of the tokens of a row."""
        return CachedRow(*(x.clone() for x in self.view_of(row)))

    def begin_with(self, row: int, other: CachedRow, count: int) -> None:
        """Fill an empty row with the first `count` tokens of another."""
        assert self.lengths[row] == 0
        self.keys[:, row, :, :count] = other.keys_LKnd[:, :, :count]
        self.values[:, row, :, :count] = other.values_LKnd[:, :, :count]
        self.lengths[row] = count

    def extend(self, rows: Sequence[int], counts: Sequence[int], decode: bool = False) -> Tensor:
        """Announce the next forward pass: `counts[i]` new tokens in row `rows[i]`.

        Returns the new tokens' positions, int64: (1, T) end to end, or (R, 1) with `decode`, where all counts are 1.
        """
        starts = [self.lengths[row] for row in rows]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        assert len(set(rows)) == len(rows), "a row is extended once per pass"
        assert min(counts) >= 1, "a row is extended by at least one token"
        assert max(ends) <= self.capacity, "the cache is full"
        for row, end in zip(rows, ends, strict=True):
            self.lengths[row] = end
        device = self.device
        if decode:
            assert max(counts) == 1
            slots_R = torch.tensor(starts, device=device)
            in_order = list(rows) == list(range(len(rows)))
            index_R = None if in_order else torch.tensor(list(rows), device=device)
            self._pass = _Pass(list(rows), starts, ends, True, index_R, slots_R, None)
            return slots_R[:, None]
        docs = None
        if max(starts) == 0:
            bounds = (0, *accumulate(counts))
            edges = torch.tensor(bounds, dtype=torch.int32, device=device)
            docs = Documents(bounds, edges, max(counts))
        self._pass = _Pass(list(rows), starts, ends, False, None, None, docs)
        pieces = [torch.arange(start, end, device=device) for start, end in zip(starts, ends, strict=True)]
        return torch.cat(pieces)[None]

    def extend_static(self, slots_R: Tensor, longest: int) -> Tensor:
        """Announce a decoding pass over the first R rows: one token for each, at its place `slots` (int64, on the
        device), which sees its row up to itself, but no more than the first `longest` tokens. Returns the positions
        (R, 1).

        It asks the device for nothing and changes nothing on the host: the caller says with `advance` which rows have
        their token. What a row that does not go on gets at its slot is overwritten by its next token.
        """
        count = len(slots_R)
        self._pass = _Pass(list(range(count)), [0] * count, [longest] * count, True, None, slots_R, None, static=True)
        return slots_R[:, None]

    def advance(self, rows: Sequence[int]) -> None:
        """Rows whose token a static pass has stored."""
        for row in rows:
            assert self.lengths[row] < self.capacity, "the cache is full"
            self.lengths[row] += 1

    def _static_span(self, now: _Pass, window: int | None) -> Spans:
        assert now.slots_R is not None
        count, device, most = len(now.rows), self.device, max(now.ends)
        places = torch.arange(count + 1, dtype=torch.int32, device=device)
        ends_R = (now.slots_R + 1).clamp(max=most).int()
        if window is None:
            return Spans(places, places * self.capacity, ends_R, most)
        used_R, edges = ends_R.clamp(max=window), places * self.capacity
        first = torch.cat((edges[:-1] + ends_R - used_R, edges[-1:]))
        return Spans(places, first, used_R, min(most, window))

    def _span(self, now: _Pass, window: int | None) -> Spans | None:
        """Where a decode pass's keys lie, for the kernel that takes rows of different lengths; None where there is no
        such kernel, or every row sees as many keys. In ascending order a row's span ends before the next one's."""
        if self._spans is None or now.rows != sorted(now.rows):
            return None
        if now.static:
            if window not in now.spans:
                now.spans[window] = self._static_span(now, window)
            return now.spans[window]
        if min(now.ends) == max(now.ends):
            return None
        if window not in now.spans:
            used = [end if window is None else min(end, window) for end in now.ends]
            first = [row * self.capacity + end - n for row, end, n in zip(now.rows, now.ends, used, strict=True)]
            edges, count = [*first, self.rows * self.capacity], len(now.rows)
            found = torch.tensor([*range(count + 1), *edges, *used], dtype=torch.int32, device=self.device)
            queries, edges_R, used_R = found.split([count + 1, count + 1, count])  # type: ignore[no-untyped-call]
            now.spans[window] = Spans(queries, edges_R, used_R, max(used))
        return now.spans[window]

    def _mask(self, now: _Pass, window: int | None) -> Tensor | None:
        """Which of the n tokens each row of a decode pass sees: (R, 1, 1, n); None for all of them."""
        if window not in now.masks:
            longest, mask_R11n = max(now.ends), None
            if now.static or min(now.ends) != longest or (window is not None and window < longest):
                places_n, slots_R1 = torch.arange(longest, device=self.device), now.slots_R[:, None]  # type: ignore[index]
                mask_Rn = places_n <= slots_R1
                if window is not None:
                    mask_Rn &= places_n > slots_R1 - window
                mask_R11n = mask_Rn[:, None, None]
                if now.static:  # added to the scores: of a bool, each layer's attention would make this by itself
                    added = torch.zeros(mask_R11n.shape, dtype=self.keys.dtype, device=self.device)
                    mask_R11n = added.masked_fill(~mask_R11n, -torch.inf)
            now.masks[window] = mask_R11n
        return now.masks[window]

    def attend(self, layer: int, q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        """Store the new keys and values of a layer; attention of the new queries over all that their rows hold, or as
        much of it as a window lets them see.

        q (1, T, H, d), k and v (1, T, K, d), or (R, 1, ...) when decoding; already rotated. Returns q's shape.
        """
        assert self._pass is not None, "extend() announces a pass before the model runs it"
        now, keys, values = self._pass, self.keys[layer], self.values[layer]
        if now.decode:
            return self._decode(now, keys, values, q_BSHd, k_BSKd, v_BSKd, scoring)
        out, first = [], 0
        for row, start, end in zip(now.rows, now.starts, now.ends, strict=True):
            new = slice(first, first + end - start)
            first = new.stop
            keys[row, :, start:end] = k_BSKd[0, new].transpose(0, 1)
            values[row, :, start:end] = v_BSKd[0, new].transpose(0, 1)
            if now.docs is None:
                out.append(_continued(q_BSHd[:, new], keys[row, :, :end], values[row, :, :end], scoring))
        return attention(q_BSHd, k_BSKd, v_BSKd, now.docs, scoring) if now.docs is not None else torch.cat(out, 1)

    def _decode(
        self,
        now: _Pass,
        keys: Tensor,
        values: Tensor,
        q_R1Hd: Tensor,
        k_R1Kd: Tensor,
        v_R1Kd: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        count, longest, window, mask_R11n = len(now.rows), max(now.ends), scoring.window, None
        if (
            count == 1 and not now.static
        ):  # plain slices: indexed writes and copies would cost as much as the attention itself
            row, slot = now.rows[0], now.starts[0]
            keys[row, :, slot], values[row, :, slot] = k_R1Kd[0, 0], v_R1Kd[0, 0]
            seen_n = slice(0 if window is None else max(0, longest - window), longest)
            k_RKnd, v_RKnd = keys[row : row + 1, :, seen_n], values[row : row + 1, :, seen_n]
        else:
            index_R = torch.arange(count, device=keys.device) if now.index_R is None else now.index_R
            keys[index_R, :, now.slots_R], values[index_R, :, now.slots_R] = k_R1Kd[:, 0], v_R1Kd[:, 0]
            spans = self._span(now, window) if scoring.softcap is None else None
            if spans is not None:
                assert self._spans is not None
                k_TKd, v_TKd = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))  # the cache itself, no copy
                return self._spans(q_R1Hd[:, 0], k_TKd, v_TKd, spans, scoring.scale)[:, None]
            k_RKnd, v_RKnd = (x[:count] if now.index_R is None else x[now.index_R] for x in (keys, values))
            k_RKnd, v_RKnd = k_RKnd[:, :, :longest], v_RKnd[:, :, :longest]
            mask_R11n = self._mask(now, window)
        if now.static and scoring.softcap is None:
            return _by_group(q_R1Hd, k_RKnd, v_RKnd, mask_R11n, scoring.scale)
        q_RH1d = q_R1Hd.transpose(1, 2)
        return grouped_sdpa(q_RH1d, k_RKnd, v_RKnd, mask_R11n, scoring=scoring).transpose(1, 2)

    def newest(self, x_BSD: Tensor) -> Tensor:
        """Of a pass's (B, S, D), the newest position of each row: (R, 1, D). Only these need logits."""
        assert self._pass is not None
        if self._pass.decode:
            return x_BSD
        counts = [end - start for start, end in zip(self._pass.starts, self._pass.ends, strict=True)]
        last_R = torch.tensor(list(accumulate(counts)), device=x_BSD.device) - 1
        return x_BSD[0, last_R][:, None]


def _by_group(q_R1Hd: Tensor, k_RKnd: Tensor, v_RKnd: Tensor, mask_R11n: Tensor | None, scale: float | None) -> Tensor:
    """Decoding attention with the query heads of a key/value head as its sequence of queries: where a mask is needed,
    a GPU's kernels take no fewer key/value heads than query heads, and repeated ones would be a copy of the cache."""
    rows, _, heads, width = q_R1Hd.shape
    q_RKgd = q_R1Hd.reshape(rows, k_RKnd.shape[1], -1, width)
    o_RKgd = F.scaled_dot_product_attention(q_RKgd, k_RKnd, v_RKnd, attn_mask=mask_R11n, scale=scale)
    return o_RKgd.reshape(rows, 1, heads, width)


def _continued(q_1SHd: Tensor, k_Knd: Tensor, v_Knd: Tensor, scoring: Scoring) -> Tensor:
    """Attention of S new queries, the newest of the n keys of their row, over all of them."""
    q_1HSd = q_1SHd.transpose(1, 2)
    seen_Sn = seen(q_1HSd.shape[2], k_Knd.shape[1], scoring.window, k_Knd.device)
    return grouped_sdpa(q_1HSd, k_Knd[None], v_Knd[None], seen_Sn, scoring=scoring).transpose(1, 2)
