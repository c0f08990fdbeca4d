"""Batches of one rank, step by step, made ahead of the training loop by one thread.

The memory held is `prefetch` steps' batches, whatever the size of the data. The state is the step number alone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lumina.data.dataset import Batch, PackedDataset
from lumina.data.order import PADDING, GlobalOrder, deal


@dataclass
class StepData:
    """One global step as one rank sees it.

    step, epoch and batch_in_epoch count from 0; micro_batches are this rank's; tokens and samples int64[n] are those of
    the whole global batch, and so is supervised_tokens, the step's true weight sum (law 2). That one is at least 1: a
    batch in which nothing is learned has gradient 0, not 0 / 0. own_samples int64[m] are those in `micro_batches`.
    """

    step: int
    epoch: int
    batch_in_epoch: int
    micro_batches: list[Batch]
    supervised_tokens: float
    tokens: int
    samples: NDArray[np.int64]
    own_samples: NDArray[np.int64]


class _Failure:
    """An exception on its way from the making thread to the loop."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Loader:
    """Iterates over StepData for steps [start_step, stop_step). Each iteration starts anew, with its own thread."""

    def __init__(
        self,
        dataset: PackedDataset,
        order: GlobalOrder,
        *,
        rank: int,
        world: int,
        micro_batch_size: int,
        start_step: int,
        stop_step: int,
        prefetch: int = 2,
    ) -> None:
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

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def step_data(self, step: int) -> StepData:
        """Global step `step`, made now."""
        samples = self.order.indices(step)
        shares = deal(samples, self.rank, self.world, self.micro_batch_size)
        return StepData(
            step=step,
            epoch=self.order.epoch_of(step),
            batch_in_epoch=self.order.batch_in_epoch(step),
            micro_batches=[self.dataset.batch(share) for share in shares],
            supervised_tokens=float(max(1, self.dataset.supervised_per_sample[samples].sum(dtype=np.int64))),
            tokens=int(self.dataset.tokens_per_sample[samples].sum(dtype=np.int64)),
            samples=samples,
            own_samples=np.concatenate([share[share != PADDING] for share in shares]),
        )

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
                for step in range(self.start_step, self.stop_step):
                    if not put(self.step_data(step)):
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
