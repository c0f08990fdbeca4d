"""Supervised fine-tuning: the assistant's tokens in conversations, by cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lumina.chat import ChatTokenizer
from lumina.config import Config
from lumina.data import Samples, TorchBatch, prepare_splits
from lumina.train.objectives import Forward, Preparation


class SupervisedFineTuning:
    figures: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        self._config = config

    def prepare_data(
        self,
        tokenizer: ChatTokenizer,
        *,
        resumed: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Samples, Samples | None]:
        return prepare_splits(self._config, tokenizer, progress=progress, resumed=resumed)

    def loss(self, forward: Forward, batch: TorchBatch, scale: float) -> torch.Tensor:
        return forward(batch, batch.weights_N * scale)

    def prepare(self, preparation: Preparation) -> None:
        """Nothing is needed."""


OBJECTIVE = SupervisedFineTuning
