"""Estimate of preparing, from a sample of the input: counts, time and disk, before any work. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lumina.chat import ChatTokenizer, Conversation
from lumina.data.account import Account
from lumina.data.converting.columns import check_columns
from lumina.data.preparing.chunking import to_chunks
from lumina.data.preparing.deduplication import TRAIN, decide, near_available, signatures_of
from lumina.data.preparing.hold_out import explain
from lumina.data.preparing.pool import BYTES_PER_WORKER, usable_cores
from lumina.data.preparing.splits import SplitSettings
from lumina.data.preparing.worker import BLOCK_BYTES, Task, read_blocks, rendered
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import check_inputs
from lumina.data.reading.streams import FileLayout, count_bytes

RANGES, RANGE_BYTES = 8, 1 << 19  # read of each file: 4 MiB, from all over it where it can be split
TOKEN_BYTES = 5  # on disk: an int32 id and a uint8 mask
CHUNK_BYTES = 64  # its other columns, and its place in the plan
_ADDED = ("lines", "bad", "conversations", "tokens", "supervised", "chunks", "seconds", "answers", "without question")
FILL = 0.98  # of packed rows, as best-fit decreasing reaches on chats


@dataclass(frozen=True)
class DataEstimate:
    """Estimates for the whole input; `sampled` is the share of it that was read."""

    input_bytes: int
    sampled: float
    lines: int
    bad_lines: int
    conversations: int
    tokens: int
    supervised_tokens: int
    samples: int
    disk_bytes: int
    seconds: float
    workers: int
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def report(self) -> list[str]:
        about = "" if self.sampled == 1.0 else "about "
        return [
            f"input          {self.input_bytes / 2**20:,.1f} MiB, {100 * self.sampled:.3g}% of it read",
            f"lines          {about}{self.lines:,}, {self.bad_lines:,} of them bad",
            f"conversations  {about}{self.conversations:,}",
            f"tokens         {about}{self.tokens:,}, {self.supervised_tokens:,} of them supervised",
            f"samples        {about}{self.samples:,}",
            f"time           about {self.seconds:,.1f} s with {self.workers} process(es)",
            f"disk           about {self.disk_bytes / 2**20:,.1f} MiB",
            *(f"warning: {warning}" for warning in self.warnings),
            "nothing was written",
        ]


def estimate(paths: Sequence[str], config: SplitSettings, tokenizer: ChatTokenizer) -> DataEstimate:
    """Renders and splits a sample of each file, as preparing does, and extrapolates.

    The sample is whole for files of up to 4 MiB. Compressed files are unpacked once to learn their size.

    Raises:
        UserError: a file is missing or empty.
    """
    files = check_inputs(paths)
    tokenizer.encode(" ")  # the vocabulary is read before the clock starts
    total = dict.fromkeys(_ADDED, 0.0)
    size, seen = 0.0, 0.0
    sampled: list[Conversation] = []
    for path in files:
        layout = detect(str(path))
        if config.columns:
            check_columns(str(path), layout, config.columns)
            layout = layout._replace(flat=False)
        account, seconds, share = _sample(path, layout, config, tokenizer, sampled)
        found = (
            account.lines, account.bad_lines, account.conversations, account.tokens + account.tokens_repeated,
            account.tokens_supervised, account.chunks, seconds,
            account.messages_supervised, account.answers_without_question,
        )  # fmt: skip
        for name, value in zip(total, found, strict=True):
            total[name] += value / share
        size += path.stat().st_size
        seen += path.stat().st_size * share
    workers = max(1, min(config.num_workers or min(usable_cores(), 16), int(size) // BYTES_PER_WORKER))
    samples = total["tokens"] / (config.seq_length * FILL) if config.packing else total["chunks"]
    answers = Account(
        overlong_context=config.overlong_context,
        messages_supervised=round(total["answers"]),
        answers_without_question=round(total["without question"]),
    )
    return DataEstimate(
        input_bytes=int(size),
        sampled=seen / size,
        lines=round(total["lines"]),
        bad_lines=round(total["bad"]),
        conversations=round(total["conversations"]),
        tokens=round(total["tokens"]),
        supervised_tokens=round(total["supervised"]),
        samples=-int(-samples // 1),
        disk_bytes=round(total["tokens"] * TOKEN_BYTES + total["chunks"] * CHUNK_BYTES),
        seconds=total["seconds"] / workers,
        workers=workers,
        warnings=[*answers.warnings(), *_hold_out_warnings(sampled, config, whole=seen == size)],
    )


def _hold_out_warnings(conversations: Sequence[Conversation], config: SplitSettings, whole: bool) -> list[str]:
    """Why a share cannot be held out as asked, as preparing would say it of these conversations alone."""
    if not config.eval_fraction or not conversations:
        return []
    near = config.dedup == "near" and near_available()  # without, preparing refuses, with the remedy
    signatures = signatures_of(conversations, near)
    given_N = np.full(len(conversations), TRAIN, dtype=np.uint8)
    _, outcome = decide(signatures, given_N, config.eval_fraction, config.dedup)
    assert outcome is not None
    if outcome.by_hash:
        return []
    why, remedy = explain(outcome, signatures.group, signatures.prompt, conversations.__getitem__)
    of_what = "" if whole else "of the part that was read, "
    met = f"eval_fraction {config.eval_fraction:g} cannot be held out" if outcome.refused else outcome.note()
    return [f"{of_what}{met}: {why}. {remedy}"]


def _sample(
    path: Path, layout: FileLayout, config: SplitSettings, tokenizer: ChatTokenizer, sampled: list[Conversation]
) -> tuple[Account, float, float]:
    """(account of what was read, seconds, share of the file that it is). Where a share is to be held out, `sampled` is
    added what was read."""
    account = Account(overlong=config.overlong, seq_length=config.seq_length)
    size, began, blocks, whole = path.stat().st_size, time.perf_counter(), 0, True
    for start, stop in _ranges(size, layout):
        how = (layout.container, layout.compression, layout.flat, layout.encoding)
        chunking = (config.seq_length, config.overlong, config.overlong_context)
        task = Task("chunks", str(path), how, start, stop, "", *chunking, columns=tuple(config.columns.items()))
        for block in read_blocks(task, account):
            to_chunks(rendered(tokenizer, block, account)[0], task.rule, account)
            sampled += block.conversations if config.eval_fraction else []
            blocks += 1
            if not layout.splittable and blocks * BLOCK_BYTES >= RANGES * RANGE_BYTES:
                whole = False
                break
    seconds = time.perf_counter() - began
    if layout.splittable:
        return account, seconds, min(1.0, RANGES * RANGE_BYTES / size)
    return account, seconds, 1.0 if whole else _share(path, layout, blocks, account.lines)


def _ranges(size: int, layout: FileLayout) -> list[tuple[int, int]]:
    if not layout.splittable or size <= RANGES * RANGE_BYTES:
        return [(0, size)]
    step = size // RANGES
    return [(number * step, number * step + RANGE_BYTES) for number in range(RANGES)]


def _share(path: Path, layout: FileLayout, blocks: int, rows: int) -> float:
    """The share of a file that its first blocks, or rows, are."""
    if layout.container == "parquet":
        import pyarrow.parquet as pq

        return min(1.0, rows / int(pq.ParquetFile(path).metadata.num_rows))
    if layout.container == "arrow":
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            held = sum(int(reader.get_batch(i).num_rows) for i in range(reader.num_record_batches))
        return min(1.0, rows / held)
    return min(1.0, blocks * BLOCK_BYTES / count_bytes(str(path), layout))
