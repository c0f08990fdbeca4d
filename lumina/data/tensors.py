"""A micro-batch as the model takes it: tensors in whole tiles of rows, and what the host must know of them.

Everything that the model or the loss would otherwise ask a device for is computed here from the host's arrays, before
the step: where the supervised positions are and how many, where documents begin, the longest of them.

Shapes: T tokens in whole tiles, D documents, N supervised positions in whole tiles, P preference pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lumina.config.rows import round_up

if TYPE_CHECKING:
    from lumina.data.dataset import Batch


class TorchBatch(NamedTuple):
    """A micro-batch of one row of T tokens, a multiple of ROW_TILE: the last document may be padding of weight zero.

    ids_T, positions_T int64; cu_seqlens_D int32[D+1], and `bounds` the same on the host; max_seqlen: the longest
    document. supervised_N int64: the positions with a loss, filled up to whole tiles with position 0; targets_N int64
    and weights_N float32 are theirs, a weight of 0 for what was filled up. `units`: what the loss is divided by for a
    mean, supervised tokens or pairs. Of preference pairs, documents_N int64 is the document of each supervised
    position and pairs_P2 float32 as in Batch.
    """

    ids_T: Tensor
    positions_T: Tensor
    cu_seqlens_D: Tensor
    supervised_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    bounds: tuple[int, ...]
    max_seqlen: int
    units: float
    documents_N: Tensor | None = None
    pairs_P2: Tensor | None = None

    def to(self, device: torch.device) -> TorchBatch:
        """The same on a device; itself where it is there."""
        if self.ids_T.device == device:
            return self
        moved = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**{name: value.to(device, non_blocking=True) for name, value in moved.items()})


def tensors(batch: Batch) -> TorchBatch:
    """The tensors of a batch, on the host."""
    tokens = len(batch.ids_T)
    extra = round_up(tokens) - tokens
    ids_T, positions_T, bounds_D = batch.ids_T, batch.positions_T, batch.cu_seqlens_D
    if extra:  # one more document, of weight zero
        ids_T = np.pad(ids_T, (0, extra))
        positions_T = np.concatenate([positions_T, np.arange(extra)])
        bounds_D = np.append(bounds_D, np.int32(tokens + extra))
    where_N = np.flatnonzero(batch.weights_T)
    fill = (0, round_up(len(where_N)) - len(where_N))
    supervised_N = np.pad(where_N, fill)
    documents_N = None
    if batch.pairs_P2 is not None:
        documents_N = torch.from_numpy(np.searchsorted(bounds_D, supervised_N, side="right") - 1)
    return TorchBatch(
        torch.from_numpy(ids_T),
        torch.from_numpy(positions_T),
        torch.from_numpy(bounds_D),
        torch.from_numpy(supervised_N),
        torch.from_numpy(batch.targets_T[supervised_N]),
        torch.from_numpy(np.pad(batch.weights_T[where_N], fill)),
        tuple(bounds_D.tolist()),
        max(batch.max_seqlen, extra),
        float(batch.weights_T.sum() if batch.pairs_P2 is None else batch.pairs_P2[:, 1].sum()),
        documents_N,
        None if batch.pairs_P2 is None else torch.from_numpy(batch.pairs_P2),
    )
