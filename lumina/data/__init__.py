"""Conversations in files -> a memory-mapped, packed, accounted data set -> batches in a fixed global order.

Names are loaded on first use: prepare's worker processes import this package and must start fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lumina.data.baseline import unigram_baseline
    from lumina.data.dataset import Batch, PackedDataset, Samples
    from lumina.data.loader import Loader, StepData
    from lumina.data.order import GlobalOrder
    from lumina.data.pairs import PairDataset, prepare_pairs
    from lumina.data.parts import prepare_parts
    from lumina.data.preparation import prepare

_HOMES = {
    "Batch": "dataset",
    "GlobalOrder": "order",
    "Loader": "loader",
    "PackedDataset": "dataset",
    "PairDataset": "pairs",
    "Samples": "dataset",
    "StepData": "loader",
    "prepare": "preparation",
    "prepare_pairs": "pairs",
    "prepare_parts": "parts",
    "unigram_baseline": "baseline",
}

__all__ = [
    "Batch",
    "GlobalOrder",
    "Loader",
    "PackedDataset",
    "PairDataset",
    "Samples",
    "StepData",
    "prepare",
    "prepare_pairs",
    "prepare_parts",
    "unigram_baseline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lumina.data.{_HOMES[name]}"), name)
