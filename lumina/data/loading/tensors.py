"""Micro-batch tensors: whole tiles of rows for the model, and what the host must know of them.

Everything that the model or the loss would otherwise ask a device for is computed here from the host's arrays, before
the step: where the supervised positions are and how many, where documents begin, the longest of them.

To a GPU they go as one copy from one block of pinned memory: each array by itself would be eight copies, and from
pageable memory each makes the host wait until the device has it. Shipper does it on a stream of its own, ahead of the
step.

Shapes: T tokens in whole tiles, D documents, N supervised positions in whole tiles, P preference pairs.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lumina.config import round_up
from lumina.data.loading.part import Part


class Arrays(Protocol):
    """What is read of a batch on the host: lumina.data.loading.dataset.Batch says what each is."""

    ids_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    weights_T: NDArray[np.float32]
    positions_T: NDArray[np.int64]
    cu_seqlens_D: NDArray[np.int32]
    max_seqlen: int
    pairs_P3: NDArray[np.float32] | None
    part: Part


class TorchBatch(NamedTuple):
    """A micro-batch of one row of T tokens, a multiple of ROW_TILE: the last document may be padding of weight zero.

    ids_T, positions_T int64; cu_seqlens_D int32[D+1], and `bounds` the same on the host; max_seqlen: the longest
    document. supervised_N int64: the positions with a loss, filled up to whole tiles with position 0; targets_N int64
    and weights_N float32 are theirs, a weight of 0 for what was filled up. `units`: what the loss is divided by for a
    mean, supervised tokens or pairs. Of preference pairs, documents_N int64 is the document of each supervised
    position and pairs_P3 float32 as in Batch.

    Of a row that ranks share this is one rank's part: T and N are its own, and supervised positions are counted from
    its first token. Documents are the whole row's, and so are pairs, whose units the first part's rank counts.
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
    pairs_P3: Tensor | None = None
    shipped: Shipped | None = None

    def to(self, device: torch.device) -> TorchBatch:
        """The same on a device, for work on its current stream, as one copy; itself where it is there."""
        if self.shipped is not None:
            self.shipped.await_on(torch.cuda.current_stream(device))
            return self._replace(shipped=None)
        if self.ids_T.device == device:
            return self
        return _copied(self, device)

    def _arrays(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}


class Shipped(NamedTuple):
    """The copy of a batch on another stream: its end, and any array over the one block of device memory."""

    block: Tensor
    done: torch.cuda.Event

    def await_on(self, stream: torch.cuda.Stream) -> None:
        """What is queued on `stream` from here on comes after the copy; the host goes on at once. The block's memory is
        not given away before that work is done, though it belongs to the copy's stream."""
        stream.wait_event(self.done)
        self.block.record_stream(stream)


class Shipper:
    """Copies of batches to a GPU on a stream of its own, for the thread that makes them: they arrive while the device
    computes an earlier step. `TorchBatch.to` then orders the step's work after the copy. To be made in that thread."""

    def __init__(self, device: torch.device) -> None:
        # A new thread's current device is the machine's first. Leaving a stream's context goes back to it, and pinned
        # memory is taken there: each begins a context of some 500 MB on it, for every rank.
        torch.cuda.set_device(device)
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: TorchBatch) -> TorchBatch:
        """The batch on the device; as it was, for `to` to copy, where the device has no room for it now."""
        try:
            with torch.cuda.stream(self._stream):
                moved = _copied(batch, self._device)
                return moved._replace(shipped=Shipped(moved.ids_T, self._stream.record_event()))
        except torch.OutOfMemoryError:
            return batch  # out of memory is answered in the loop, where it can be


_ALIGNED = 64  # bytes: what vectorised loads ask of an array's beginning, and a cache line


def _copied(batch: TorchBatch, device: torch.device) -> TorchBatch:
    """The batch on a device by one copy of one block; the host does not wait for it where the device is a GPU."""
    arrays = batch._arrays()
    ends = list(accumulate(-(-value.nbytes // _ALIGNED) * _ALIGNED for value in arrays.values()))
    block = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = list(zip(arrays.items(), [0, *ends[:-1]], strict=True))
    for (_, value), start in places:
        _view(block, start, value).copy_(value)
    there = block.to(device, non_blocking=True)
    moved: dict[str, Any] = {name: _view(there, start, value) for (name, value), start in places}
    return batch._replace(**moved)


def _view(block: Tensor, start: int, like: Tensor) -> Tensor:
    return block[start : start + like.nbytes].view(like.dtype).view(like.shape)


def tensors(batch: Arrays) -> TorchBatch:
    """The tensors of a batch, on the host; those of the rank's part where a row is shared."""
    tokens, part = int(batch.cu_seqlens_D[-1]), batch.part
    start, stop = part.bounds(tokens)
    extra = (stop - start) * part.count - tokens
    ids_T, positions_T, bounds_D = batch.ids_T, batch.positions_T, batch.cu_seqlens_D
    if extra:  # one more document, of weight zero
        bounds_D = np.append(bounds_D, np.int32(tokens + extra))
    if stop > tokens:  # some of it, or all, is this part's
        ids_T = np.pad(ids_T, (0, stop - start - len(ids_T)))
        positions_T = np.concatenate([positions_T, np.arange(max(start, tokens), stop) - tokens])
    where_N = np.flatnonzero(batch.weights_T)
    weights_N = batch.weights_T[where_N]
    fill = round_up(len(where_N)) - len(where_N)
    where_N = np.pad(where_N, (0, fill))
    documents_N = None
    if batch.pairs_P3 is not None:
        documents_N = torch.from_numpy(np.searchsorted(bounds_D, start + where_N, side="right") - 1)
        units = float(batch.pairs_P3[:, 1].sum()) if part.first else 0.0
    else:
        units = float(weights_N.sum())
    return TorchBatch(
        torch.from_numpy(ids_T),
        torch.from_numpy(positions_T),
        torch.from_numpy(bounds_D),
        torch.from_numpy(where_N),
        torch.from_numpy(batch.targets_T[where_N]),
        torch.from_numpy(np.pad(weights_N, (0, fill))),
        tuple(bounds_D.tolist()),
        max(batch.max_seqlen, extra),
        units,
        documents_N,
        None if batch.pairs_P3 is None else torch.from_numpy(batch.pairs_P3),
    )
