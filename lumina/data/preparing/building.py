"""Building a cache: the tasks that are not done yet, one account, one packing, and the name when all is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from lumina.chat import ChatTokenizer
from lumina.config import UserError
from lumina.data.account import Account
from lumina.data.cache import arrow
from lumina.data.cache.files import Contents
from lumina.data.cache.shards import open_batches, write_plan
from lumina.data.converting.columns import described
from lumina.data.preparing.mixing import LEFT_OUT, repeats, shares
from lumina.data.preparing.packing import pack, rows_to_chunks
from lumina.data.preparing.pool import run_tasks
from lumina.data.preparing.worker import Task
from lumina.files import rename_durably, write_json

OnProgress = Callable[[int, int], None]  # bytes of input done, bytes of input in all


class PrepareSettings(Protocol):
    """What prepare reads from the configuration."""

    @property
    def seq_length(self) -> int: ...
    @property
    def packing(self) -> bool: ...
    @property
    def overlong(self) -> Any: ...
    @property
    def overlong_context(self) -> float: ...
    @property
    def cache_dir(self) -> str | None: ...
    @property
    def num_workers(self) -> int | None: ...
    @property
    def columns(self) -> Mapping[str, str]: ...


def build(
    tasks: Sequence[Task],
    contents: Contents,
    config: PrepareSettings,
    tokenizer: ChatTokenizer,
    fingerprint: str,
    final: Path,
    workers: int,
    progress: OnProgress | None,
    weights: Mapping[str, float] | None,
) -> None:
    """Runs the tasks that are not done yet, packs, and gives the folder its name.

    `contents`: of the files, which `fingerprint` stands for. Nothing is kept of a file that is not what it was.

    Raises:
        UserError: an input cannot be read, was changed while it was, or nothing is left to train on.
    """
    partial = final.with_name(f"{final.name}.partial")
    files = list(dict.fromkeys(task.path for task in tasks))
    reports: list[dict[str, Any] | None] = [_finished(task) for task in tasks]
    total = sum(task.stop - task.start for task in tasks)
    bytes_done = sum(task.stop - task.start for task, report in zip(tasks, reports, strict=True) if report)

    def done(number: int, report: dict[str, Any]) -> None:
        nonlocal bytes_done
        task = tasks[number]
        contents.check(task.path)
        write_json(_report_path(Path(task.out)), {**report, "range": [task.start, task.stop]})
        reports[number] = report
        bytes_done += task.stop - task.start
        if progress is not None:
            progress(bytes_done, total)

    waiting = [(i, task) for i, (task, report) in enumerate(zip(tasks, reports, strict=True)) if report is None]
    run_tasks(waiting, workers, tokenizer, done)
    complete = [report for report in reports if report is not None]
    assert len(complete) == len(tasks)

    context = config.overlong_context if config.overlong == "split" else 0.0
    account = Account(overlong=config.overlong, overlong_context=context, seq_length=config.seq_length)
    merge_accounts(tasks, complete, account)
    account.notes += column_notes(tasks)
    _refuse_nothing(account, files, config, partial)
    _pack(tasks, config, account, partial, weights or {})
    account.check()
    for task in tasks:
        _report_path(Path(task.out)).unlink()
    for leftover in partial.glob(".*.partial"):
        leftover.unlink()
    names = [Path(task.out).name for task in tasks]
    meta = {
        "fingerprint": fingerprint,
        "account": account.to_dict(),
        "window": config.seq_length,
        "packing": config.packing,
        "tokenizer": tokenizer.fingerprint,
        "pad_id": tokenizer.pad_id,
        "sources": files,
        "shards": [
            {"file": name, "rows": report["rows"], "source": task.path, "line_base": base}
            for name, report, task, base in zip(names, complete, tasks, line_bases(tasks, complete), strict=True)
        ],
        "sizes": {name: (partial / name).stat().st_size for name in [*names, "plan.arrow"]},
    }
    write_json(partial / "meta.json", meta)
    rename_durably(partial, final)  # one that is there already is damaged: open_cached refused it


def column_notes(tasks: Sequence[Task]) -> list[str]:
    """A line for each file with a column mapping."""
    mapped = {task.path: dict(task.columns) for task in tasks if task.columns}
    return [f"columns of {path}: {described(columns)}" for path, columns in mapped.items()]


def _refuse_nothing(account: Account, files: Sequence[str], config: PrepareSettings, partial: Path) -> None:
    """Raises a UserError that says why, when nothing is left to train on."""
    if not account.conversations:
        shutil.rmtree(partial)
        raise UserError(
            f"no usable conversation in {', '.join(files)}: all {account.bad_lines:,} lines are bad",
            "\n  ".join(account.details()) or "Every line is blank.",
        )
    if not account.tokens_supervised:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in account.conversations_dropped.items())
        why = dropped or f"no answer lies within the first {config.seq_length:,} tokens"
        raise UserError(
            f"nothing is left to train on of the {account.conversations:,} conversations in {', '.join(files)}: {why}",
            "Raise seq_length or use --overlong split." if not dropped or account.overlong_conversations else None,
        )


def _report_path(chunks: Path) -> Path:
    return chunks.with_suffix(".json")


def _finished(task: Task) -> dict[str, Any] | None:
    """The report of a task that an earlier, interrupted run has finished; None when it has to be done."""
    try:
        report = orjson.loads(_report_path(Path(task.out)).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    same = isinstance(report, dict) and report.get("range") == [task.start, task.stop]
    return report if same and Path(task.out).is_file() else None


def line_bases(tasks: Sequence[Task], reports: Sequence[dict[str, Any]]) -> list[int]:
    """How many lines of its file come before each task's range."""
    bases, count = [], 0
    for task, report in zip(tasks, reports, strict=True):
        count = count if task.start else 0
        bases.append(count)
        count += report["lines"]
    return bases


def merge_accounts(tasks: Sequence[Task], reports: Sequence[dict[str, Any]], account: Account) -> None:
    """Adds the tasks' accounts to `account`, with file names and true line numbers."""
    for task, report, base in zip(tasks, reports, line_bases(tasks, reports), strict=True):
        account.merge(Account.from_dict(report["account"]), task.path, base)


def _column(tasks: Sequence[Task], name: str) -> np.ndarray[Any, Any]:
    """One integer column over all chunks, in order."""
    batches = [batch for task in tasks for batch in open_batches(Path(task.out))]
    columns = [arrow.numpy(batch.column(name)) for batch in batches]
    return np.concatenate(columns) if columns else np.empty(0, dtype=np.int32)


def _pack(
    tasks: Sequence[Task], config: PrepareSettings, account: Account, folder: Path, weights: Mapping[str, float]
) -> None:
    """Packs the chunks into samples and writes the plan; only lengths are in memory, some 24 bytes a chunk."""
    tokens_C, supervised_C = _column(tasks, "tokens"), _column(tasks, "supervised")
    chosen = np.arange(len(tokens_C), dtype=np.int64)
    if any(weights.get(task.path, 1.0) != 1.0 for task in tasks):
        chosen = _mix(tasks, account, weights, tokens_C, supervised_C)
    tokens_E, supervised_E = tokens_C[chosen], supervised_C[chosen]
    row_E = pack(tokens_E, config.seq_length) if config.packing else np.arange(len(tokens_E), dtype=np.int64)
    order, offsets = rows_to_chunks(row_E)
    tokens_S = np.add.reduceat(tokens_E[order], offsets[:-1], dtype=np.int32)
    supervised_S = np.add.reduceat(supervised_E[order], offsets[:-1], dtype=np.int32)
    account.samples = len(tokens_S)
    account.epoch_tokens = int(tokens_E.sum(dtype=np.int64))
    write_plan(folder / "plan.arrow", tokens_S, supervised_S, chosen[order], offsets)


def _mix(
    tasks: Sequence[Task],
    account: Account,
    weights: Mapping[str, float],
    tokens_C: NDArray[np.int32],
    supervised_C: NDArray[np.int32],
) -> NDArray[np.int64]:
    """The chunks of an epoch under the files' weights; what a weight leaves out is entered as dropped."""
    counts = [sum(batch.num_rows for batch in open_batches(Path(task.out))) for task in tasks]
    task_C = np.repeat(np.arange(len(tasks)), counts)
    names = list(dict.fromkeys(task.path for task in tasks))
    file_C = np.array([names.index(task.path) for task in tasks])[task_C]
    repeats_C = repeats(file_C, task_C, _column(tasks, "line"), [weights.get(name, 1.0) for name in names])
    gone_C = repeats_C == 0
    supervised, masked, elsewhere = (_column(tasks, name)[gone_C] for name in ("trained", "masked", "repeated"))
    supervised_tokens, repeated = int(supervised_C[gone_C].sum()), int(elsewhere.sum())
    other = int(tokens_C[gone_C].sum(dtype=np.int64)) - supervised_tokens - repeated
    account.messages_supervised -= int(supervised.sum())
    account.messages_masked -= int(masked.sum())
    account.drop_messages(LEFT_OUT, int(supervised.sum() + masked.sum()))
    account.tokens_supervised -= supervised_tokens
    account.tokens_masked -= other
    account.tokens_repeated -= repeated
    account.drop_tokens(LEFT_OUT, supervised_tokens + other)
    account.notes += shares(names, [weights.get(name, 1.0) for name in names], file_C, repeats_C, supervised_C)
    if gone_C.all():
        raise UserError("every source has weight 0", "Give at least one a weight above 0.")
    return np.repeat(np.arange(len(tokens_C), dtype=np.int64), repeats_C)
