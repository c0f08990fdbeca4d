"""Data loader of one rank: batches step by step, prefetched by one thread.

Ranks that share rows (sequence parallelism) read the same samples, and each keeps its part of them.

The memory held is `prefetch` steps' batches, or parts of them, whatever the size of the data. The state is the step
number alone.
"""

from __future__ import annotations

import queue
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lumina.data.loading.dataset import Batch, Samples, read_rows
from lumina.data.loading.order import PADDING, GlobalOrder, deal
from lumina.data.loading.part import WHOLE, Part

if TYPE_CHECKING:
    import torch

    from lumina.data.loading.tensors import TorchBatch


@dataclass
class StepData:
    """The data of one global step on one rank.

    step, epoch and batch_in_epoch count from 0; micro_batches are this rank's; tokens and samples int64[n] are those of
    the whole global batch, and so is supervised_tokens, the step's true weight sum (law 2): of preference pairs, their
    number. It is 0 where no token is supervised: such a step is no update. own_samples int64[m] are those in
    `micro_batches` that this rank counts; shares float64[n]: of each sample's tokens, the supervised ones; corrupt:
    those of this rank's samples that it counts and that could not be read and are of weight zero here, though
    supervised_tokens counts them.
    """

    step: int
    epoch: int
    batch_in_epoch: int
    micro_batches: list[Batch]
    supervised_tokens: float
    tokens: int
    samples: NDArray[np.int64]
    own_samples: NDArray[np.int64]
    shares: NDArray[np.float64]
    corrupt: list[int] = field(default_factory=list)


_NOTHING = np.empty(0, dtype=np.int64)
_AT_ONCE = 1 << 20  # tokens of a sample that are looked through at a time
# What reading a damaged file raises, whatever its format. A program's errors, TypeError, AttributeError or KeyError,
# are none of these: they would be every sample's.
_DAMAGE = (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error, pa.ArrowException)


class _Failure:
    """An exception on its way from the making thread to the loop."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Loader:
    """Prefetching iterator over steps [start_step, stop_step). Each iteration starts anew, with its own thread."""

    def __init__(
        self,
        dataset: Samples,
        order: GlobalOrder,
        *,
        rank: int,
        world: int,
        micro_batch_size: int,
        start_step: int,
        stop_step: int,
        prefetch: int = 2,
        replace_corrupt: bool = False,
        vocab_size: int | None = None,
        device: torch.device | None = None,
        part: Part = WHOLE,
    ) -> None:
        """`rank` of `world`: which of the readers this is, between whom a step's samples are dealt out; `part`: of its
        rows, where several processes read the same; their first counts the samples. `device`: where the model is; to a
        GPU the thread copies each batch ahead of its step. `replace_corrupt`: a sample that cannot be read, or that
        holds tokens outside `vocab_size`, becomes padding and is named in StepData.corrupt; else reading it raises."""
        assert order.num_samples == dataset.num_samples
        assert 0 <= rank < world
        assert prefetch >= 1
        self.dataset = dataset
        self.order = order
        self.rank = rank
        self.world = world
        self.micro_batch_size = micro_batch_size
        self.start_step = start_step
        self.stop_step = stop_step
        self.prefetch = prefetch
        self.replace_corrupt = replace_corrupt
        self.vocab_size = vocab_size
        self.device = device
        self.part = part

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def step_data(self, step: int) -> StepData:
        """Global step `step`, made now."""
        samples = self.order.indices(step)
        dealt = deal(samples, self.rank, self.world, self.micro_batch_size)
        corrupt: list[int] = []
        shares = self.dataset.supervised_share(samples)
        supervised = self.dataset.supervised_per_sample[samples].sum(dtype=np.int64) if shares.any() else 0
        micro_batches = [self._read(indices, corrupt) for indices in dealt]
        if not self.part.first:  # the first part's rank has the same
            dealt, corrupt = [], []
        return StepData(
            step=step,
            epoch=self.order.epoch_of(step),
            batch_in_epoch=self.order.batch_in_epoch(step),
            micro_batches=micro_batches,
            supervised_tokens=float(supervised),
            tokens=int(self.dataset.tokens_per_sample[samples].sum(dtype=np.int64)),
            samples=samples,
            shares=shares,
            own_samples=np.concatenate([_NOTHING, *(indices[indices != PADDING] for indices in dealt)]),
            corrupt=corrupt,
        )

    def _read(self, share: NDArray[np.int64], corrupt: list[int]) -> Batch:
        """A micro-batch, or this rank's part of it; what is corrupt in it is replaced and added to `corrupt`."""
        if not self.replace_corrupt:
            return read_rows(self.dataset, share, self.part)
        if self.part.count == 1:
            try:
                whole = read_rows(self.dataset, share)
            except _DAMAGE:  # found out sample by sample
                whole = None
            if whole is not None and self._valid(whole):
                return whole
        bad = [int(sample) for sample in share if sample != PADDING and not self._readable(int(sample))]
        corrupt += bad
        return read_rows(self.dataset, np.where(np.isin(share, bad), PADDING, share), self.part)

    def _readable(self, sample: int) -> bool:
        """All of the sample, whatever this rank has of it, a piece at a time: ranks that share a row replace the same
        ones. Their files are the same bytes, and so is what is damaged there. What the disk or the network of one of
        them does is its own, and the row would have another length there, for which the others would wait: an OSError
        ends such a run."""
        shared = self.part.count > 1
        pieces = -(-int(self.dataset.tokens_per_sample[sample]) // _AT_ONCE) if shared else 1
        try:
            return all(self._valid(read_rows(self.dataset, [sample], Part(at, pieces))) for at in range(pieces))
        except OSError as error:
            if shared:
                raise OSError(
                    f"sample {sample} cannot be read on this rank, and the ranks that share its row may have read it: "
                    f"{error}"
                ) from error
            return False
        except _DAMAGE:
            return False

    def _valid(self, batch: Batch) -> bool:
        """Whether every token exists and every weight is 0 or 1: what a damaged cache file breaks."""
        ids, weights = batch.ids_T, batch.weights_T
        if not len(ids):  # of a part beyond the row's end
            return True
        inside = ids.min() >= 0 and (self.vocab_size is None or ids.max() < self.vocab_size)
        return bool(inside and ((weights == 0) | (weights == 1)).all())

    def _shipper(self) -> Callable[[TorchBatch], TorchBatch]:
        """What puts a batch where the model is; on a CPU it is there."""
        if self.device is None or self.device.type != "cuda":
            return lambda batch: batch
        from lumina.data.loading.tensors import Shipper

        return Shipper(self.device)

    def __iter__(self) -> Iterator[StepData]:
        ready: queue.Queue[StepData | _Failure | None] = queue.Queue(maxsize=self.prefetch)
        stop = threading.Event()

        def put(item: StepData | _Failure | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def make() -> None:
            try:
                ship = self._shipper()
                for step in range(self.start_step, self.stop_step):
                    data = self.step_data(step)
                    for batch in data.micro_batches:
                        batch.made = ship(batch.torch())
                    if not put(data):
                        return
                put(None)
            except BaseException as error:  # raised again in the loop that waits for this step
                put(_Failure(error))

        thread = threading.Thread(target=make, name="lumina-loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, _Failure):
                    raise item.error
                yield item
        finally:
            stop.set()
            thread.join()
