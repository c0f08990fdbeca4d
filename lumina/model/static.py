"""Static decoding steps: shapes that do not depend on how long sequences are, so that a GPU replays a CUDA graph.

A step in Python issues some ten launches a layer, and a small model's kernels end before the next one is issued
(benchmarks/host_time.py measures the host's time). A CUDA graph issues all of them at once, but replays the very shapes
and addresses that it was captured with. So a step here works on the first rows of the cache, as many as the next power
of two, and lets each see as many tokens as the next bucket of lengths; what differs from step to step lies in one
buffer of inputs, which the host fills with one copy, and what the host is to know lies in one buffer of outputs. Each
bucket is captured when it is needed for the fourth time.

On a CPU the same steps run eagerly (Replay): by that their equality with the ordinary ones, their fixed addresses and
the absence of questions to the device are tested without a card. No card was at hand when this was written: no speed
was measured.

Shapes as in cache.py; V vocabulary, k candidates, F numbers that say how to choose, t numbers told of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lumina.model.cache import KVCache
from lumina.model.experts import GroupedLinear, in_one_launch
from lumina.model.transformer import Transformer

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (R, k) of the candidates, largest first, their ids (R, k), how to choose, float64 (R, F)) -> what the host is
told of each row, int64 (R, t). A part of the graph: it may ask the device for nothing."""

_SHORTEST = 256  # the smallest bucket of lengths
_CANDIDATES = (2, 64)  # buckets of how many of the largest logits decide, before all of them
_WARM_UP = 3  # calls before a capture: kernels are compiled and libraries take their memory in them


def row_bucket(rows: int, most: int) -> int:
    """The power of two from `rows` on, `most` at most."""
    return min(1 << (rows - 1).bit_length(), most)


def length_bucket(length: int, most: int) -> int:
    """256, 384, 512, 768, 1024, ...: the first from `length` on, `most` at most. A row reads half again as much as it
    needs, at worst."""
    whole = max(_SHORTEST, 1 << (length - 1).bit_length())
    return min(whole * 3 // 4 if length <= whole * 3 // 4 and whole > _SHORTEST else whole, most)


def candidate_bucket(candidates: int | None, vocabulary: int) -> int:
    """2, 64 or all."""
    wanted = vocabulary if candidates is None else candidates
    return next((bucket for bucket in _CANDIDATES if wanted <= bucket < vocabulary), vocabulary)


def static_fits(model: Transformer) -> bool:
    """Whether a step of this model asks the device for nothing. Where torch has no grouped product for experts, they
    are multiplied one by one, and the host must know how many tokens each has."""
    grouped = (module.weight for module in model.modules() if isinstance(module, GroupedLinear))
    return all(in_one_launch(weight_EOI[0], weight_EOI) for weight_EOI in grouped)


class Replay:
    """Runs one function of fixed buffers again and again: on a GPU as a CUDA graph; elsewhere it calls the function."""

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        """`pool`: memory that several graphs may share, since one is over before the next begins
        (torch.cuda.graph_pool_handle)."""
        self._left = _WARM_UP if device.type == "cuda" else -1
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], None]) -> None:
        """The same function at every call; it is not held on to, which would keep its buffers until the next garbage
        collection."""
        if self._left:
            self._left -= 1
            function()
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads of a server may allocate meanwhile. A capture runs nothing.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function()
            self._graph = graph  # a capture that failed, for want of memory, leaves nothing that could be replayed
        self._graph.replay()


class StaticDecoder:
    """Decoding steps of one model over one cache, as static passes. Neither may move or change type meanwhile.
    On a GPU only for models that `static_fits` says yes to: a graph can hold no question to the device."""

    def __init__(
        self, model: Transformer, cache: KVCache, forbidden_V: Tensor, choose: Choose, settings: int, told: int
    ) -> None:
        """`settings` and `told`: F and t of `choose`. `forbidden_V` (bool) marks tokens that are never chosen."""
        device, rows = cache.device, cache.rows
        self._model, self._cache, self._choose = model, cache, choose
        self._vocabulary, self._forbidden_V = len(forbidden_V), forbidden_V
        # Ids and slots are float64 among the settings: whole numbers below 2^53 are exact, and one copy is one launch.
        on_gpu = device.type == "cuda"
        self._host_RF = torch.zeros(rows, 2 + settings, dtype=torch.float64, pin_memory=on_gpu)
        self._inputs_RF = torch.zeros(rows, 2 + settings, dtype=torch.float64, device=device)
        self._told_Rt = torch.zeros(rows, told, dtype=torch.int64, device=device)
        self._logits_RV = torch.zeros(0, device=device)  # made when first wanted
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._steps: dict[tuple[int, int, int], Replay] = {}

    def step(
        self, ids: Sequence[int], rows: Sequence[int], settings_RF: Tensor, candidates: int | None
    ) -> list[list[int]]:
        """Feed one token to each of the cache's `rows` and choose the next among the `candidates` largest logits (None:
        all) of tokens that are not forbidden. settings: float64 (R, F) on the host. Returns what `choose` tells of each
        row: the only wait for the device."""
        told = self.launch(ids, rows, settings_RF, candidates).tolist()
        return [told[row] for row in rows]

    def launch(self, ids: Sequence[int], rows: Sequence[int], settings_RF: Tensor, candidates: int | None) -> Tensor:
        """As `step`, but does not wait: what is told of the first rows of the cache, int64 on the device, until the
        next step."""
        count = self._run(ids, rows, settings_RF, candidate_bucket(candidates, self._vocabulary))
        return self._told_Rt[:count]

    def logits(self, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Feed one token to each of the cache's `rows`; the logits that follow, (R, V), of forbidden tokens too."""
        if not len(self._logits_RV):
            self._logits_RV = torch.zeros(
                self._cache.rows, self._vocabulary, dtype=self._cache.keys.dtype, device=self._cache.device
            )
        self._run(ids, rows, None, 0)
        if list(rows) == list(range(len(rows))):
            return self._logits_RV[: len(rows)]
        return torch.stack([self._logits_RV[row] for row in rows])

    def _run(self, ids: Sequence[int], rows: Sequence[int], settings_RF: Tensor | None, candidates: int) -> int:
        """Returns how many rows the step had."""
        cache = self._cache
        count = row_bucket(max(rows) + 1, cache.rows)
        # A row that does not go on gets something where its next token will be. It must be a number, since a later
        # sequence of the row may read it with weight 0: so that row too sees its past, wherever its window is.
        longest = max(cache.lengths[:count])
        assert longest < cache.capacity, "a row that is full has no place for it"
        length = length_bucket(longest + 1, cache.capacity)
        host_RF = self._host_RF[:count].zero_()
        host_RF[:, 1] = torch.tensor(cache.lengths[:count], dtype=torch.float64)
        given = list(rows)
        host_RF[given, 0] = torch.tensor(ids, dtype=torch.float64)
        if settings_RF is not None:
            host_RF[given, 2:] = settings_RF
        self._inputs_RF[:count].copy_(host_RF, non_blocking=True)
        key = (count, length, candidates)
        if key not in self._steps:
            self._steps[key] = Replay(cache.device, self._pool)
        self._steps[key](lambda: self._body(*key))
        cache.advance(rows)
        return count

    def _body(self, count: int, length: int, candidates: int) -> None:
        """A step: from the inputs' buffer to the outputs'. 0 candidates: to the logits'."""
        inputs_RF = self._inputs_RF[:count]
        ids_R1, slots_R = inputs_RF[:, :1].long(), inputs_RF[:, 1].long()
        positions_R1 = self._cache.extend_static(slots_R, length)
        logits_RV = self._model(ids_R1, positions_R1, cache=self._cache)[:, 0]
        if not candidates:
            self._logits_RV[:count].copy_(logits_RV)
            return
        logits_RV = logits_RV.masked_fill(self._forbidden_V, -torch.inf)
        whole = candidates == self._vocabulary
        kept_Rk, ids_Rk = logits_RV.sort(descending=True) if whole else logits_RV.topk(candidates)
        self._told_Rt[:count].copy_(self._choose(kept_Rk, ids_Rk, inputs_RF[:, 2:]))
