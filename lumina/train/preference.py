"""What the reference model of preference training prefers: computed once, with the engine that is about to be trained.

The reference is the model that the run begins with. Before the first step the engine holds it, so no second model is
ever in memory; a pair's margin under it is one number, kept in RUN/reference/ for the run's whole life.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lumina import checkpoint
from lumina.data import PADDING, PairDataset, deal
from lumina.train.deepspeed.engine import Engine, Ranks

log = logging.getLogger("lumina")

FOLDER = "reference"


def give_references(
    datasets: Sequence[PairDataset],
    folder: Path,
    engine: Engine,
    ranks: Ranks,
    micro_batch_size: int,
    fresh: bool,
    begin: Callable[[], None],
    beat: Callable[[str], None],
) -> None:
    """Set `reference_P` of each data set; collective. `folder`: the run's. `fresh`: the run begins anew, and what an
    earlier one of its name left is not its own. `begin` puts the reference model's weights into the engine."""
    begun = False
    for dataset in datasets:
        kept = None if fresh else _agreed(ranks, folder, dataset)
        if kept is None:
            if not begun:
                begin()
                begun = True
            kept = compute(dataset, engine, ranks, micro_batch_size, beat)
            if ranks.main:
                _write(folder, dataset, kept)
        dataset.reference_P = kept


@torch.no_grad()
def compute(
    dataset: PairDataset, engine: Engine, ranks: Ranks, micro_batch_size: int, beat: Callable[[str], None]
) -> NDArray[np.float32]:
    """The margin of every pair under the engine's weights, in nats; collective."""
    engine.ds.eval()
    pairs, margins = [], []
    for share in deal(np.arange(dataset.num_samples), ranks.rank, ranks.world, micro_batch_size):
        beat("reference log-probabilities")
        margins.append(engine.margins(dataset.batch(share).torch()))
        pairs.append(share)
    share, margin_P = np.concatenate(pairs), torch.cat(margins).double().cpu().numpy()  # the one wait for the device
    own_P = np.zeros(dataset.num_samples)
    own_P[share[share != PADDING]] = margin_P[share != PADDING]
    found = torch.from_numpy(own_P).to(engine.device)
    dist.all_reduce(found)
    engine.ds.train()
    return found.float().cpu().numpy()


# --- Kept in the run's folder ---------------------------------------------------------------------


def _paths(folder: Path, dataset: PairDataset) -> tuple[Path, Path]:
    name = dataset.fingerprint[:32]
    return folder / FOLDER / f"{name}.npy", folder / FOLDER / f"{name}.json"


def _write(folder: Path, dataset: PairDataset, margins_P: NDArray[np.float32]) -> None:
    values, facts = _paths(folder, dataset)
    values.parent.mkdir(parents=True, exist_ok=True)
    with values.open("wb") as file:
        np.save(file, margins_P)
    checkpoint.fsync(values)
    checkpoint.write_json(facts, {"fingerprint": dataset.fingerprint, "sha256": checkpoint.file_sha256(values)})


def _agreed(ranks: Ranks, folder: Path, dataset: PairDataset) -> NDArray[np.float32] | None:
    """What rank 0 finds kept, on every rank."""
    found: list[Any] = [_read(folder, dataset) if ranks.main else None]
    dist.broadcast_object_list(found)
    kept: NDArray[np.float32] | None = found[0]
    return kept


def _read(folder: Path, dataset: PairDataset) -> NDArray[np.float32] | None:
    """None where nothing sound is kept for these very pairs."""
    values, facts = _paths(folder, dataset)
    try:
        said = json.loads(facts.read_text())
        whole = hashlib.sha256(values.read_bytes()).hexdigest() == said["sha256"]
        if not whole or said["fingerprint"] != dataset.fingerprint:
            raise ValueError("it does not match its hash")
        margins_P: NDArray[np.float32] = np.load(values, allow_pickle=False)
        return margins_P
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the reference model's log-probabilities are computed anew: %s: %s", values, error)
        return None
