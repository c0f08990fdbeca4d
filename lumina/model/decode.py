"""A decoding step: one new token for each of R sequences, from their ids to logits.

On a CPU in bfloat16 the whole step is one compiled call (`decode_kernels.c`); elsewhere it is the model's forward.

Shapes as in transformer.py and cache.py.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumina.model import cpu, ops
from lumina.model.cache import KVCache
from lumina.model.transformer import Transformer

_I64, _PTR = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {"lumina_decode": [_PTR] * 10 + [_I64] * 10 + [ctypes.c_float, ctypes.c_int]}
_MOST_ROWS = 8  # beyond that, matrix products that reuse the weights in registers are faster


@functools.cache
def _lib() -> ctypes.CDLL | None:
    return cpu.open_library(Path(__file__).with_name("decode_kernels.c"), _SIGNATURES)


class Decoder:
    """Decoding steps of one model over one cache. Neither may move to another device or type meanwhile."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._weights = _in_order(model)
        plain = all(weight.is_contiguous() for weight in self._weights)
        self.compiled = plain and ops._use_cpu(*self._weights, cache.keys) and _lib() is not None
        if self.compiled:
            pointers = [weight.data_ptr() for weight in self._weights]
            self._pointers = (ctypes.c_void_p * len(pointers))(*pointers)

    def step(self, ids_R1: Tensor, rows: list[int]) -> Tensor:
        """Logits (R, V) of the tokens after `ids`, which join the cache's `rows`: float32, or the model's dtype."""
        slots = [self._cache.lengths[row] for row in rows]
        positions_R1 = self._cache.extend(rows, [1] * len(rows), decode=True)
        if not self.compiled or len(rows) > _MOST_ROWS:
            return self._model(ids_R1, positions_R1, cache=self._cache)[:, 0]  # type: ignore[no-any-return]
        return self._call(ids_R1, positions_R1, rows, slots)

    def _call(self, ids_R1: Tensor, positions_R1: Tensor, rows: list[int], slots: list[int]) -> Tensor:
        config, cache, threads = self._model.config, self._cache, torch.get_num_threads()
        count, layers = len(rows), config.num_layers
        x_RD = self._model.embedding.weight[ids_R1[:, 0]].float()
        rotary = ops.Rotary.of(positions_R1, config.head_dim, config.rope_theta)
        logits_RV = torch.empty(count, config.vocab_size)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        scratch = torch.empty(count * (config.hidden_size + width + config.ffn_size) + threads * cache.capacity)
        where = torch.tensor([rows, slots])
        tensors = (
            x_RD,
            logits_RV,
            cache.keys,
            cache.values,
            where[0],
            where[1],
            rotary.cos_BSh,
            rotary.sin_BSh,
            scratch,
        )
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = (
            layers,
            count,
            config.hidden_size,
            *heads,
            config.ffn_size,
            config.vocab_size,
            cache.rows,
            cache.capacity,
        )
        library = _lib()
        assert library is not None
        addresses = [tensor.data_ptr() for tensor in tensors]
        library.lumina_decode(self._pointers, *addresses, *sizes, config.rms_norm_eps, threads)
        return logits_RV


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
