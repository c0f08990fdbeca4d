"""Training objectives, one file each, found through lumina.config.registry.OBJECTIVES.

An objective says what data a run takes, how a micro-batch is scored, and what is computed before the first step. A
file's OBJECTIVE is a class made from the run's configuration. Another package adds one by an entry point:

    [project.entry-points."lumina.objectives"]
    unlikelihood = "my_package.unlikelihood:OBJECTIVE"
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lumina.chat import ChatTokenizer
from lumina.config import OBJECTIVES, Config
from lumina.data import Part, Samples, TorchBatch


class Forward(Protocol):
    """The model's forward pass over a micro-batch that is on the device."""

    def __call__(self, batch: TorchBatch, weights_N: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """sum(weight * token loss) in nats, a float32 scalar, with weights of the batch's N supervised positions; the
        logits, (1, T, V), without. `options` go to lumina.model.Transformer.forward, which says what they lead to."""


@dataclass(frozen=True)
class Preparation:
    """What an objective may use before the first step; every rank has one, and its calls are collective.

    train_data, eval_data: from `prepare_data`. rank: of `world` processes. data_rank: of `data_world` readers, between
    whom samples are dealt out; the ranks of one share its rows, each has `part` of them (Batch.part), and the first
    part's counts what is of whole rows. folder: the run's, which rank 0 may write to while `may_write` says so: until
    another start owns the run. resumed: whether the run goes on from a checkpoint. initialise: puts the weights that
    the run begins with into the engine, which a resumed run's checkpoint replaces afterwards. forward: the model's, on
    `device`. evaluation: the model without dropout in its `with` block, in which passes are to be made: the watchdog
    follows them there, and a collective may take as long as in a step. heartbeat: to be called at least every few
    seconds with what is being done. progress: shows on rank 0's console what is being done, how much of it is done, and
    of how much. by_rank_0: calls what it is given on rank 0 alone, and what it raises there ends every rank: for files.
    """

    train_data: Samples
    eval_data: Samples | None
    folder: Path
    may_write: Callable[[], bool]
    rank: int
    world: int
    data_rank: int
    data_world: int
    part: Part
    micro_batch_size: int
    resumed: bool
    initialise: Callable[[], None]
    forward: Forward
    evaluation: Callable[[], AbstractContextManager[None]]
    device: torch.device
    heartbeat: Callable[[str], None]
    progress: Callable[[str, int, int], None]
    by_rank_0: Callable[[Callable[[], None]], None]


class Objective(Protocol):
    """What a run learns from, and by what loss. figures: names of what is shown and recorded beside the loss, such as
    `rewards/margins`."""

    figures: tuple[str, ...]

    def prepare_data(
        self,
        tokenizer: ChatTokenizer,
        *,
        resumed: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Samples, Samples | None]:
        """The data to train and to evaluate on. resumed: the fingerprint of the data that the run was trained on so
        far; data that is found under it in the cache is taken as it is. progress: told the bytes of input that are
        done, and all of them, where that takes long; without it the log is. Raises UserError."""

    def loss(self, forward: Forward, batch: TorchBatch, scale: float) -> torch.Tensor:
        """scale * sum(weight * loss) of a micro-batch's tokens, pairs, …, in nats, a float32 scalar: never a mean, so
        that the step's gradient is divided once, by the whole batch's true count (law 2). With figures, (1 + F): after
        the loss scale * sum(weight * figure) of each, of which no gradient is taken."""

    def prepare(self, preparation: Preparation) -> None:
        """Called once, before the first step and before a checkpoint is loaded; collective."""


def objective(config: Config) -> Objective:
    """The objective that `config` names. Raises UserError where another package's does not load."""
    made: Objective = OBJECTIVES.get(config.objective)(config)
    return made
