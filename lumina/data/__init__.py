"""Conversations in files -> a memory-mapped, packed, accounted data set -> batches in a fixed global order.

Names are loaded on first use: prepare's worker processes import this package and must start fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lumina.data.formats import convert
    from lumina.data.loading.baseline import unigram_baseline
    from lumina.data.loading.dataset import Batch, PackedDataset, Samples
    from lumina.data.loading.loader import Loader, StepData
    from lumina.data.loading.order import PADDING, GlobalOrder, deal, sample_sums, samples_id
    from lumina.data.loading.tensors import TorchBatch
    from lumina.data.preference.dataset import PairDataset, prepare_pairs
    from lumina.data.preparing.preparation import prepare
    from lumina.data.preparing.splits import prepare_parts
    from lumina.data.reading.items import read_items
    from lumina.data.reading.layout import detect
    from lumina.data.reading.paths import expand
    from lumina.data.records.fault import BLANK, Fault, Tree
    from lumina.data.reports.validation import validate

_HOMES = {
    "formats": ("convert",),
    "loading.baseline": ("unigram_baseline",),
    "loading.dataset": ("Batch", "PackedDataset", "Samples"),
    "loading.loader": ("Loader", "StepData"),
    "loading.order": ("PADDING", "GlobalOrder", "deal", "sample_sums", "samples_id"),
    "loading.tensors": ("TorchBatch",),
    "preference.dataset": ("PairDataset", "prepare_pairs"),
    "records.fault": ("BLANK", "Fault", "Tree"),
    "preparing.preparation": ("prepare",),
    "preparing.splits": ("prepare_parts",),
    "reading.items": ("read_items",),
    "reading.layout": ("detect",),
    "reading.paths": ("expand",),
    "reports.validation": ("validate",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BLANK",
    "PADDING",
    "Batch",
    "Fault",
    "GlobalOrder",
    "Loader",
    "PackedDataset",
    "PairDataset",
    "Samples",
    "StepData",
    "TorchBatch",
    "Tree",
    "convert",
    "deal",
    "detect",
    "expand",
    "prepare",
    "prepare_pairs",
    "prepare_parts",
    "read_items",
    "sample_sums",
    "samples_id",
    "unigram_baseline",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lumina.data.{_HOME_OF[name]}"), name)
