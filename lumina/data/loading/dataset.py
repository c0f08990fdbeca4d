"""The prepared data set over memory maps, and the padding-free batch.

Shapes: T tokens of a batch, D documents of a batch, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lumina.chat import Tokenizer
from lumina.data.account import Account
from lumina.data.cache import arrow
from lumina.data.cache.chunks import ranges
from lumina.data.cache.shards import open_batches, open_chunks
from lumina.data.loading.order import PADDING
from lumina.data.loading.part import WHOLE, Part

if TYPE_CHECKING:
    from lumina.data.loading.tensors import TorchBatch


@dataclass
class Batch:
    """A padding-free micro-batch: samples one after another; attention and positions stay inside a document. Where
    ranks share the row, the arrays of tokens are those of `part`; documents and pairs are the whole row's.

    ids_T, targets_T int64: a token and the next one of the same document; weights_T float32: 1 where the target is
    supervised (0 at every document's last token, whose target is its own id); positions_T int64 from 0 in each
    document; cu_seqlens_D int32[D+1]: document bounds, 0 first, the row's length last; max_seqlen: the longest of them.
    Of preference pairs (lumina.data.preference) every two documents are one, and pairs_P3 float32 is what the reference
    model prefers the first by, in nats, the pair's weight: 1, or 0 for padding, and the reference's log-probability of
    the first.
    """

    ids_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    weights_T: NDArray[np.float32]
    positions_T: NDArray[np.int64]
    cu_seqlens_D: NDArray[np.int32]
    max_seqlen: int
    pairs_P3: NDArray[np.float32] | None = None
    part: Part = WHOLE
    made: TorchBatch | None = field(default=None, repr=False, compare=False)
    """What `torch` returns, where the loader has made it ahead of the step."""

    def torch(self) -> TorchBatch:
        """The same as tensors for the model, in whole tiles of rows."""
        from lumina.data.loading.tensors import tensors

        return self.made if self.made is not None else tensors(self)


class Samples(Protocol):
    """What training asks of a data set: packed conversations, or preference pairs. `folder`, where its files are, and
    `part` of `batch` are asked for where ranks share rows alone: another package's data set may do without them."""

    folder: Path
    fingerprint: str
    tokens_per_sample: NDArray[np.int32]
    supervised_per_sample: NDArray[np.int32]

    @property
    def num_samples(self) -> int: ...
    def account_lines(self) -> list[str]: ...
    def supervised_share(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """The share of each sample's tokens that is supervised."""

    def batch(self, indices: Sequence[int] | NDArray[np.int64], part: Part = WHOLE) -> Batch:
        """These samples as one row, or of its tokens `part`'s; index -1 is a padding sample."""


def read_rows(dataset: Samples, indices: Sequence[int] | NDArray[np.int64], part: Part = WHOLE) -> Batch:
    """`dataset.batch`, which is told of `part` only where it is not the whole."""
    return dataset.batch(indices) if part.count == 1 else dataset.batch(indices, part)


class Chunk(NamedTuple):
    """One document as stored: ids_T int32, mask_T uint8; context: how many tokens it begins with that come from earlier
    in its conversation."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    context: int
    source: str
    line: int


class _Block(NamedTuple):
    """One record batch as arrays over the memory map."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    offsets: NDArray[np.int32]
    context: NDArray[Any]
    line: NDArray[np.int64]


class PackedDataset:
    """Packed conversations of a finished cache. Opening reads meta.json and maps the plan; tokens are mapped later."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.meta = meta
        self.fingerprint: str = meta["fingerprint"]
        self.seq_length: int = meta["window"]
        self.account: dict[str, Any] = meta["account"]
        (plan,) = open_batches(folder / "plan.arrow")
        self.tokens_per_sample: NDArray[np.int32] = arrow.numpy(plan.column("tokens"))
        self.supervised_per_sample: NDArray[np.int32] = arrow.numpy(plan.column("supervised"))
        self._sample_chunks: NDArray[np.int64] = arrow.numpy(plan.column("pieces").values)
        self._sample_offsets: NDArray[np.int64] = arrow.numpy(plan.column("pieces").offsets)
        self._pad_id = int(meta.get("pad_id", Tokenizer.load().pad_id))  # caches from before imported models were
        rows = [
            (shard, batch, count) for shard, s in enumerate(meta["shards"]) for batch, count in enumerate(s["rows"])
        ]
        self._block_homes = [(shard, batch) for shard, batch, _ in rows]
        self._block_starts = np.concatenate([[0], np.cumsum([count for _, _, count in rows], dtype=np.int64)])
        self._shards: dict[int, list[_Block]] = {}

    @property
    def num_samples(self) -> int:
        return len(self.tokens_per_sample)

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, repeated context included."""
        return self._totals[0]

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of an epoch."""
        return self._totals[1]

    @cached_property
    def _totals(self) -> tuple[int, int]:
        tokens, supervised = self.tokens_per_sample, self.supervised_per_sample
        return int(tokens.sum(dtype=np.int64)), int(supervised.sum(dtype=np.int64))

    def account_lines(self) -> list[str]:
        """Law 4's account as lines of text."""
        return Account.from_dict(self.account).report()

    def supervised_share(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """The share of each sample's tokens that is supervised."""
        return self.supervised_per_sample[indices] / self.tokens_per_sample[indices]

    def _block(self, number: int) -> _Block:
        shard, index = self._block_homes[number]
        if shard not in self._shards:
            self._shards[shard] = [
                _Block(
                    arrow.numpy(batch.column("ids").values),
                    arrow.numpy(batch.column("mask").values),
                    arrow.numpy(batch.column("ids").offsets),
                    arrow.numpy(batch.column("context")),
                    arrow.numpy(batch.column("line")),
                )
                for batch in open_chunks(self.folder / self.meta["shards"][shard]["file"])
            ]
        return self._shards[shard][index]

    def chunks_of(self, sample: int) -> list[Chunk]:
        """The documents of one sample, with where each was read."""
        first, last = self._sample_offsets[sample], self._sample_offsets[sample + 1]
        chunks = []
        for chunk in self._sample_chunks[first:last]:
            number = int(np.searchsorted(self._block_starts, chunk, side="right")) - 1
            block, row = self._block(number), int(chunk - self._block_starts[number])
            shard = self.meta["shards"][self._block_homes[number][0]]
            start, stop = block.offsets[row], block.offsets[row + 1]
            line = int(block.line[row]) + shard["line_base"]
            chunks.append(
                Chunk(block.ids[start:stop], block.mask[start:stop], int(block.context[row]), shard["source"], line)
            )
        return chunks

    def document_lengths(self, sample: int) -> NDArray[np.int64]:
        """How many tokens each document of a sample has, in no order; no token is read."""
        chunk_D = self._sample_chunks[self._sample_offsets[sample] : self._sample_offsets[sample + 1]]
        block_D = np.searchsorted(self._block_starts, chunk_D, side="right") - 1
        lengths = []
        for number in np.unique(block_D).tolist():
            row_D = chunk_D[block_D == number] - self._block_starts[number]
            offsets = self._block(number).offsets
            lengths.append(offsets[row_D + 1] - offsets[row_D])
        return np.concatenate(lengths).astype(np.int64)

    def batch(self, indices: Sequence[int] | NDArray[np.int64], part: Part = WHOLE) -> Batch:
        """The samples `indices` in that order; index -1 is a padding sample: one token of weight 0. Of `part` alone the
        tokens are read."""
        index_S = np.asarray(indices, dtype=np.int64)
        if index_S.size == 0:
            raise ValueError("a batch needs at least one sample index")
        if index_S.min() < PADDING or index_S.max() >= self.num_samples:
            raise IndexError(f"sample indices must lie in [-1, {self.num_samples})")
        ids, masks = [], []
        for sample in index_S.tolist():
            if sample == PADDING:
                ids.append(np.array([self._pad_id], dtype=np.int32))
                masks.append(np.zeros(1, dtype=np.uint8))
                continue
            first, last = self._sample_offsets[sample], self._sample_offsets[sample + 1]
            chunk_D = self._sample_chunks[first:last]
            block_D = np.searchsorted(self._block_starts, chunk_D, side="right") - 1
            row_D = chunk_D - self._block_starts[block_D]
            for number, row in zip(block_D.tolist(), row_D.tolist(), strict=True):
                block = self._block(number)
                start, stop = block.offsets[row], block.offsets[row + 1]
                ids.append(block.ids[start:stop])
                masks.append(block.mask[start:stop])
        return join(ids, masks, part)


def join(ids: list[NDArray[np.int32]], masks: list[NDArray[np.uint8]], part: Part = WHOLE) -> Batch:
    """Collates documents into one padding-free batch, or the part of it. A target's weight is the mask of the
    document's next token."""
    lengths_D = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    bounds = np.concatenate([[0], np.cumsum(lengths_D)])
    longest, tokens = int(lengths_D.max()), int(bounds[-1])
    start, stop = (0, tokens) if part.count == 1 else np.minimum(part.bounds(tokens), tokens).tolist()
    first_D = np.zeros_like(lengths_D)  # where in each document the part begins
    if part.count > 1:
        there = slice(int(np.searchsorted(bounds, start, "right")) - 1, int(np.searchsorted(bounds, stop)))
        first_D = np.maximum(start - bounds[:-1], 0)[there]
        # One token more than the part has, where its last document goes on: the last one's target.
        end_D = np.minimum(stop + 1 - bounds[:-1], lengths_D)[there]
        ids = [x_T[a:b] for x_T, a, b in zip(ids[there], first_D, end_D, strict=True)]
        masks = [x_T[a:b] for x_T, a, b in zip(masks[there], first_D, end_D, strict=True)]
        lengths_D = end_D - first_D
    if start == stop:  # of a short row there may be nothing left
        nothing = np.zeros(0, dtype=np.int64)
        return Batch(nothing, nothing, nothing.astype(np.float32), nothing, bounds.astype(np.int32), longest, part=part)
    ids_T = np.concatenate(ids).astype(np.int64)
    last_D = np.cumsum(lengths_D) - 1
    targets_T = np.empty_like(ids_T)
    targets_T[:-1] = ids_T[1:]
    targets_T[last_D] = ids_T[last_D]
    mask_T = np.concatenate(masks)
    weights_T = np.zeros(len(ids_T), dtype=np.float32)
    weights_T[:-1] = mask_T[1:]
    weights_T[last_D] = 0.0
    positions_T = ranges(first_D, first_D + lengths_D)
    own, bounds_D = slice(stop - start), bounds.astype(np.int32)
    return Batch(ids_T[own], targets_T[own], weights_T[own], positions_T[own], bounds_D, longest, part=part)
