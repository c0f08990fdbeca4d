"""Conversations in files -> a memory-mapped, packed, accounted data set -> batches in a fixed global order.

Names are loaded on first use: prepare's worker processes import this package and must start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.data.converting.fixing import write_fixed
    from lumina.data.converting.oasst_files import process_oasst_file
    from lumina.data.formats import convert
    from lumina.data.loading.baseline import unigram_baseline
    from lumina.data.loading.dataset import Batch, PackedDataset, Samples, read_rows
    from lumina.data.loading.loader import Loader, StepData
    from lumina.data.loading.order import PADDING, GlobalOrder, deal, sample_sums, samples_id
    from lumina.data.loading.part import Part
    from lumina.data.loading.tensors import TorchBatch
    from lumina.data.oasst.extraction import THREADS, OasstOptions
    from lumina.data.preference.dataset import PairDataset, prepare_pairs
    from lumina.data.preparing.preparation import prepare
    from lumina.data.preparing.splits import prepare_splits
    from lumina.data.reading.items import read_items
    from lumina.data.reading.layout import detect
    from lumina.data.reading.paths import check_inputs, expand
    from lumina.data.records.fault import BLANK, Fault, Tree
    from lumina.data.reports.estimate import estimate
    from lumina.data.reports.html import render_report
    from lumina.data.reports.inspection import SHOWN_ENDS, describe_sample, render_sample
    from lumina.data.reports.record import describe_record, render_record
    from lumina.data.reports.text import validation_lines
    from lumina.data.reports.validation import validate

_HOMES = {
    "converting.fixing": ("write_fixed",),
    "converting.oasst_files": ("process_oasst_file",),
    "formats": ("convert",),
    "loading.baseline": ("unigram_baseline",),
    "loading.dataset": (
        "Batch",
        "PackedDataset",
        "Samples",
        "read_rows",
    ),
    "loading.loader": (
        "Loader",
        "StepData",
    ),
    "loading.order": (
        "PADDING",
        "GlobalOrder",
        "deal",
        "sample_sums",
        "samples_id",
    ),
    "loading.part": ("Part",),
    "loading.tensors": ("TorchBatch",),
    "oasst.extraction": (
        "THREADS",
        "OasstOptions",
    ),
    "preference.dataset": (
        "PairDataset",
        "prepare_pairs",
    ),
    "preparing.preparation": ("prepare",),
    "preparing.splits": ("prepare_splits",),
    "reading.items": ("read_items",),
    "reading.layout": ("detect",),
    "reading.paths": (
        "check_inputs",
        "expand",
    ),
    "records.fault": (
        "BLANK",
        "Fault",
        "Tree",
    ),
    "reports.estimate": ("estimate",),
    "reports.html": ("render_report",),
    "reports.inspection": (
        "SHOWN_ENDS",
        "describe_sample",
        "render_sample",
    ),
    "reports.record": (
        "describe_record",
        "render_record",
    ),
    "reports.text": ("validation_lines",),
    "reports.validation": ("validate",),
}
__getattr__ = names_of(__name__, {name: home for home, names in _HOMES.items() for name in names})

__all__ = [
    "BLANK",
    "PADDING",
    "SHOWN_ENDS",
    "THREADS",
    "Batch",
    "Fault",
    "GlobalOrder",
    "Loader",
    "OasstOptions",
    "PackedDataset",
    "PairDataset",
    "Part",
    "Samples",
    "StepData",
    "TorchBatch",
    "Tree",
    "check_inputs",
    "convert",
    "deal",
    "describe_record",
    "describe_sample",
    "detect",
    "estimate",
    "expand",
    "prepare",
    "prepare_pairs",
    "prepare_splits",
    "process_oasst_file",
    "read_items",
    "read_rows",
    "render_record",
    "render_report",
    "render_sample",
    "sample_sums",
    "samples_id",
    "unigram_baseline",
    "validate",
    "validation_lines",
    "write_fixed",
]
