"""Direct preference optimisation: pairs of a chosen and a rejected answer (arXiv:2305.18290).

The reference model is the one that the run begins with. The engine holds it before the first step, so no second model
is ever in memory: each pair's margin under it, log p(chosen) - log p(rejected), and its log p(chosen) are two numbers,
computed once and kept in RUN/reference/ for the run's intact life. The loss is lumina.model.preference's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lumina.chat import ChatTokenizer
from lumina.config import Config, UserError
from lumina.data import PADDING, PairDataset, Samples, TorchBatch, deal, prepare_pairs
from lumina.files import atomic_file, file_sha256, read_json, write_json
from lumina.model import PREFERENCE_FIGURES
from lumina.train.objectives import Forward, Preparation

log = logging.getLogger("lumina")

FOLDER = "reference"


class DirectPreferenceOptimisation:
    figures = PREFERENCE_FIGURES

    def __init__(self, config: Config) -> None:
        self._config = config

    def prepare_data(
        self,
        tokenizer: ChatTokenizer,
        *,
        resumed: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Samples, Samples | None]:
        config = self._config
        if config.init_from is None and resumed is None:
            raise UserError(
                "objective dpo moves a model away from what it began as, and none is given", "Add --init-from RUN."
            )
        given = {"data": config.data, "eval_fraction": config.eval_fraction, "dedup": config.dedup != "none"}
        for name in filter(given.__getitem__, given):
            raise UserError(f"{name} is not for preference pairs", "Give files of pairs with train_data and eval_data.")
        earlier = resumed is not None
        train = prepare_pairs(config.train_data, config, tokenizer, earlier=earlier)
        if earlier and train.fingerprint != resumed:
            return self.prepare_data(tokenizer)
        held_out = prepare_pairs(config.eval_data, config, tokenizer, earlier=earlier) if config.eval_data else None
        return train, held_out

    def loss(self, forward: Forward, batch: TorchBatch, scale: float) -> torch.Tensor:
        return _score(forward, batch, scale, self._config.dpo_beta)

    def prepare(self, preparation: Preparation) -> None:
        """Give each data set the reference model's log-probabilities: those that the run has kept, or computed now."""
        initialised = False
        for dataset in (preparation.train_data, preparation.eval_data):
            if dataset is None:
                continue
            assert isinstance(dataset, PairDataset), "what prepare_data made"
            # What an earlier run of this name left is not this run's own.
            kept = _stored(preparation, dataset) if preparation.resumed else None
            if kept is None:
                if not initialised:
                    preparation.initialise()
                    initialised = True
                kept = reference_log_probabilities(dataset, preparation)
                preparation.by_rank_0(partial(_keep, preparation, dataset, kept))
            dataset.reference_P2 = kept


def _score(forward: Forward, batch: TorchBatch, scale: float, beta: float | None) -> torch.Tensor:
    """The sums of the pairs' losses and figures at `beta` (1 + F), or without one their answers' log-probabilities
    (P, 2), in nats."""
    assert batch.pairs_P3 is not None
    reference_P, weight_P, reference_chosen_P = batch.pairs_P3.unbind(1)
    pairs_P3 = torch.stack((reference_P, weight_P * scale, reference_chosen_P), 1)
    return forward(batch, batch.weights_N, documents_N=batch.documents_N, pairs_P3=pairs_P3, beta=beta)


@torch.no_grad()
def reference_log_probabilities(dataset: PairDataset, preparation: Preparation) -> NDArray[np.float32]:
    """The margin of every pair and log p(chosen) under the engine's weights, in nats (P, 2); collective."""
    indices, answers = [], []
    part, device = preparation.part, preparation.device
    with preparation.evaluation():
        every, micro_batch_size = np.arange(dataset.num_samples), preparation.micro_batch_size
        shares = deal(every, preparation.data_rank, preparation.data_world, micro_batch_size)
        for number, share in enumerate(shares, 1):
            preparation.heartbeat("reference log-probabilities")
            row = dataset.batch(share, part)
            answers.append(_score(preparation.forward, row.torch().to(device), 1.0, None))
            indices.append(share)
            preparation.progress("Preparing the reference", number, len(shares))
        share, answer_P2 = np.concatenate(indices), torch.cat(answers).double().cpu().numpy()  # the one wait for it
        own_P2 = np.zeros((dataset.num_samples, 2))
        # The margin as it is, not from two float32 numbers: they are large and nearly cancel.
        margin_P = answer_P2[:, 0] - answer_P2[:, 1]
        if part.first:  # the ranks that share rows have the same sums
            own_P2[share[share != PADDING]] = np.stack((margin_P, answer_P2[:, 0]), 1)[share != PADDING]
        found = torch.from_numpy(own_P2).to(device)
        dist.all_reduce(found)
    return found.float().cpu().numpy()


# --- Kept in the run's folder ---------------------------------------------------------------------


def _paths(folder: Path, dataset: PairDataset) -> tuple[Path, Path]:
    name = dataset.fingerprint[:32]
    return folder / FOLDER / f"{name}.npy", folder / FOLDER / f"{name}.json"


def _keep(preparation: Preparation, dataset: PairDataset, values_P2: NDArray[np.float32]) -> None:
    if not preparation.may_write():
        return
    values, facts = _paths(preparation.folder, dataset)
    values.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(values) as scratch, scratch.open("wb") as file:
        np.save(file, values_P2)
    write_json(facts, {"fingerprint": dataset.fingerprint, "sha256": file_sha256(values)})


def _stored(preparation: Preparation, dataset: PairDataset) -> NDArray[np.float32] | None:
    """What rank 0 finds in the run's folder, on every rank; collective."""
    found: list[Any] = [_read(preparation.folder, dataset) if preparation.rank == 0 else None]
    dist.broadcast_object_list(found)
    kept: NDArray[np.float32] | None = found[0]
    return kept


def _read(folder: Path, dataset: PairDataset) -> NDArray[np.float32] | None:
    """What is kept in the run's folder (P, 2); None where it is not for these very pairs, or is damaged. Versions up to
    0.2.0 kept the margins alone: then log p(chosen) is NaN, and so are the rewards of single answers."""
    values, facts = _paths(folder, dataset)
    try:
        stored = read_json(facts)
        intact = hashlib.sha256(values.read_bytes()).hexdigest() == stored["sha256"]
        if not intact or stored["fingerprint"] != dataset.fingerprint:
            raise ValueError("it does not match its hash")
        kept: NDArray[np.float32] = np.load(values, allow_pickle=False)
        return kept if kept.ndim == 2 else np.stack((kept, np.full_like(kept, np.nan)), 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the reference model's log-probabilities are computed anew: %s: %s", values, error)
        return None


OBJECTIVE = DirectPreferenceOptimisation
