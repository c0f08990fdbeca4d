"""A decoding step: one new token for each of R sequences, from their ids to logits.

On a CPU in bfloat16 and float32 the whole step is one compiled call (`decode_kernels.c`), in which a sequence's logits
do not depend on the other rows; elsewhere it is the model's forward.

Shapes as in transformer.py and cache.py.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lumina.config import ModelConfig
from lumina.model import cpu, ops
from lumina.model.cache import KVCache
from lumina.model.transformer import Transformer

_I64, _PTR = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    **{f"lumina_decode_{kind}": [_PTR] * 10 + [_I64] * 10 + [ctypes.c_float, ctypes.c_int] for kind in ("bf16", "f32")},
    "lumina_some_bf16": [_PTR] * 4 + [_I64] * 2 + [ctypes.c_int],
    "lumina_quantise": [_PTR] * 4 + [_I64] * 2 + [ctypes.c_int],
    "lumina_bounds": [_PTR] * 7 + [_I64] * 3 + [ctypes.c_int],
}
_MOST_ROWS = {torch.bfloat16: 8, torch.float32: 16}  # beyond that, torch's matrix products are faster
_MOST_SHORTLISTED = 2  # beyond that, reading the output matrix once for all rows costs less than the bounds of each


@functools.cache
def _lib() -> ctypes.CDLL | None:
    return cpu.open_library(Path(__file__).with_name("decode_kernels.c"), _SIGNATURES)


class Shortlist:
    """The exact k largest logits while reading half of the output matrix's bytes.

    A copy of the matrix in 8 bits gives each logit to within a proven bound. Only rows whose upper bound reaches the
    kth largest lower bound can be among the k largest, and only for these is the logit computed, from the true weights.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight_VD = weight_VD
        vocabulary, width = weight_VD.shape
        self._quantised_VD = torch.empty(vocabulary, width, dtype=torch.int8)
        self._scale_V, self._error_V = torch.empty(vocabulary), torch.empty(vocabulary)
        self._run("lumina_quantise", weight_VD, self._quantised_VD, self._scale_V, self._error_V, vocabulary, width)

    @staticmethod
    def _run(name: str, *arguments: Tensor | int) -> None:
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        getattr(_lib(), name)(*values, torch.get_num_threads())

    def top(self, x_RD: Tensor, k: int, forbidden_V: Tensor) -> tuple[Tensor, Tensor]:
        """(logits float32 (R, k), ids int64 (R, k)), largest first, of rows that are not forbidden. x: float32."""
        (count, width), vocabulary = x_RD.shape, len(self._weight_VD)
        low_RV, high_RV = torch.empty(count, vocabulary), torch.empty(count, vocabulary)
        tables = self._quantised_VD, self._scale_V, self._error_V
        norms_R = torch.linalg.vector_norm(x_RD, dim=-1)
        self._run("lumina_bounds", x_RD, norms_R, *tables, low_RV, high_RV, count, vocabulary, width)
        low_RV.masked_fill_(forbidden_V, -torch.inf)
        high_RV.masked_fill_(forbidden_V, -torch.inf)
        least_R1 = low_RV.topk(k).values[:, -1:] if k > 1 else low_RV.amax(-1, keepdim=True)
        if not least_R1.isfinite().all():  # a diverged model: no bound says anything
            return torch.full((count, k), torch.nan), torch.zeros(count, k, dtype=torch.int64)
        kept, ids = [], []
        for x_D, can_V in zip(x_RD, high_RV >= least_R1, strict=True):
            ids_n = can_V.nonzero()[:, 0]
            logits_n = torch.empty(len(ids_n))
            self._run("lumina_some_bf16", x_D, self._weight_VD, ids_n, logits_n, len(ids_n), len(x_D))
            best = logits_n.topk(k)
            kept.append(best.values)
            ids.append(ids_n[best.indices])
        return torch.stack(kept), torch.stack(ids)


_shortlists: WeakKeyDictionary[Transformer, Shortlist] = WeakKeyDictionary()


class Decoder:
    """Decoding steps of one model over one cache. Neither may move to another device or type meanwhile, and the model's
    weights may not change while any decoder of it lives. `forbidden_V` (bool) marks tokens that are never chosen."""

    def __init__(self, model: Transformer, cache: KVCache, forbidden_V: Tensor) -> None:
        self._model, self._cache, self._forbidden_V = model, cache, forbidden_V
        self._forbidden_n = forbidden_V.nonzero()[:, 0]
        self._weights = _in_order(model) if _is_plain(model.config) else []
        self._dtype = cache.keys.dtype
        self.compiled = bool(self._weights) and _usable(*self._weights, cache.keys)
        self._most_rows = _MOST_ROWS.get(self._dtype, 0)
        self._shortlists = self.compiled and self._dtype is torch.bfloat16
        if self.compiled:
            pointers = [weight.data_ptr() for weight in self._weights]
            self._pointers = (ctypes.c_void_p * len(pointers))(*pointers)

    def largest(self, logits_RV: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
        """(logits, ids) of the k largest of tokens that are not forbidden, largest first; of all when k is None.
        Overwrites the logits of forbidden tokens: these are few, and a masked copy of all took 1.7 ms for 8 rows."""
        logits_RV.index_fill_(-1, self._forbidden_n, -torch.inf)
        if k == 1:
            kept_R1, ids_R1 = logits_RV.max(-1, keepdim=True)
            return kept_R1, ids_R1
        kept_Rk, ids_Rk = logits_RV.sort(descending=True) if k is None else logits_RV.topk(k)
        return kept_Rk, ids_Rk

    def step(self, ids_R1: Tensor, rows: list[int], k: int | None) -> tuple[Tensor, Tensor]:
        """Feed one token to each of the cache's `rows`; `largest` of the logits that follow."""
        if not self._shortlists or k is None or len(rows) > _MOST_SHORTLISTED:
            return self.largest(self.logits(ids_R1, rows), k)
        slots, positions_R1 = self._extend(rows)
        x_RD = self._call(ids_R1, positions_R1, rows, slots, None)
        if self._model not in _shortlists:
            _shortlists[self._model] = Shortlist(self._model.output.weight)
        return _shortlists[self._model].top(x_RD, k, self._forbidden_V)

    def logits(self, ids_R1: Tensor, rows: list[int]) -> Tensor:
        """Feed one token to each of the cache's `rows`; the logits that follow, (R, V), of forbidden tokens too."""
        slots, positions_R1 = self._extend(rows)
        if not self.compiled or len(rows) > self._most_rows:
            return self._model(ids_R1, positions_R1, cache=self._cache)[:, 0]  # type: ignore[no-any-return]
        logits_RV = torch.empty(len(rows), self._model.config.vocab_size)
        self._call(ids_R1, positions_R1, rows, slots, logits_RV)
        return logits_RV

    def _extend(self, rows: list[int]) -> tuple[list[int], Tensor]:
        slots = [self._cache.lengths[row] for row in rows]
        return slots, self._cache.extend(rows, [1] * len(rows), decode=True)

    def _call(
        self, ids_R1: Tensor, positions_R1: Tensor, rows: list[int], slots: list[int], logits_RV: Tensor | None
    ) -> Tensor:
        """Run the compiled step; fills in the logits when they are wanted. Returns the output layer's input (R, D)."""
        config, cache, threads = self._model.config, self._cache, torch.get_num_threads()
        count, hidden = len(rows), config.hidden_size
        x_RD = self._model.embedding.weight[ids_R1[:, 0]].float()
        rope = self._model.ropes[0]
        assert rope is not None
        rotary = ops.Rotary.of(positions_R1, *rope)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        scratch = torch.empty(count * (hidden + width + config.ffn_size) + threads * cache.capacity)
        where = torch.tensor([rows, slots])
        tensors = x_RD, logits_RV, cache.keys, cache.values, where[0], where[1], rotary.cos_BSh, rotary.sin_BSh, scratch
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = config.num_layers, count, hidden, *heads, config.ffn_size, config.vocab_size, cache.rows, cache.capacity
        library = _lib()
        assert library is not None
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        step = library.lumina_decode_bf16 if self._dtype is torch.bfloat16 else library.lumina_decode_f32
        step(self._pointers, *addresses, *sizes, config.rms_norm_eps, threads)
        return scratch[: count * hidden].view(count, hidden)


def _usable(*tensors: Tensor) -> bool:
    """Whether the compiled step can read these: on a CPU, of one type that it knows, contiguous, and no other path
    asked for."""
    kind = tensors[0].dtype
    alike = all(t.device.type == "cpu" and t.dtype is kind and t.is_contiguous() for t in tensors)
    allowed = ops._choice() == "auto" and not torch.compiler.is_compiling()
    return alike and kind in _MOST_ROWS and allowed and cpu.lib() is not None and _lib() is not None


def _is_plain(config: ModelConfig) -> bool:
    """Whether the compiled step computes this model: Llama's decoder, whose heads fill the hidden width."""
    first = config.layers[0]
    numbers = (config.embedding_multiplier, config.residual_multiplier, config.logit_scale)
    scores = (config.attention_scale, config.attention_softcap, config.logit_softcap)
    return (
        config.structure.is_llamas
        and config.experts is None
        and first.window is None
        and first.rope is not None
        and first.rope.width == config.head_dim
        and all(layer == first for layer in config.layers)
        and numbers == (1.0, 1.0, 1.0)
        and scores == (None, None, None)
        and config.num_heads * config.head_dim == config.hidden_size
    )


def _in_order(model: Transformer) -> list[Tensor]:
    """The weights as lumina_decode reads them."""
    within = [
        "attention_norm",
        "attention.qkv",
        "attention.out",
        "feed_forward_norm",
        "feed_forward.gate_up",
        "feed_forward.down",
    ]
    layers = range(model.config.num_layers)
    names = [f"blocks.{layer}.{name}.weight" for layer in layers for name in within]
    return [model.get_parameter(name) for name in (*names, "norm.weight", "output.weight")]
