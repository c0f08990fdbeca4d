"""Conversation files -> the packed cache: found again by fingerprint, built in parallel, named only when whole.

    CACHE/FINGERPRINT/        pieces-00000.arrow …, plan.arrow, meta.json
    CACHE/FINGERPRINT.partial the same while it is being made: finished tasks are kept over a kill and not done again
    CACHE/sources.json        content hashes of the inputs by path, size and time, so that reuse reads no input

The tasks depend on the input alone, never on the number of workers, so the result is byte-identical however it came
about.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from lumina.chat.template import TEMPLATE_VERSION
from lumina.chat.tokenizer import Tokenizer
from lumina.config.errors import UserError
from lumina.data.account import Account
from lumina.data.cutting import MIN_WINDOW, POLICIES
from lumina.data.dataset import PackedDataset
from lumina.data.files import cache_root, content_digests, write_json
from lumina.data.packing import pack, rows_to_pieces
from lumina.data.pool import run_tasks, usable_cores
from lumina.data.shards import open_batches, write_plan
from lumina.data.sources import detect, expand
from lumina.data.worker import Task

FORMAT_VERSION = 1
# A task is a 16th of the input within these bounds: small files still feed several workers, large ones make few files.
MIN_TASK_BYTES, MAX_TASK_BYTES = 1 << 20, 64 << 20

Progress = Callable[[int, int], None]  # bytes of input done, bytes of input in all


class Settings(Protocol):
    """What prepare reads from the configuration."""

    @property
    def seq_length(self) -> int: ...
    @property
    def packing(self) -> bool: ...
    @property
    def overlong(self) -> Any: ...
    @property
    def cache_dir(self) -> str | None: ...
    @property
    def num_workers(self) -> int | None: ...


def prepare(
    paths: Sequence[str | os.PathLike[str]],
    config: Settings,
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    wait_seconds: float = 3600.0,
    selection: Selection | None = None,
) -> PackedDataset:
    """The packed data set of these files, from the cache when nothing has changed.

    Args:
        paths: files of conversations, read in this order.
        workers: processes; None takes config.num_workers, else the usable cores (at most 16).
        wait_seconds: how long to wait for another process that is preparing the same data.
        selection: the part of the conversations to take; None takes all.

    Raises:
        UserError: a file is missing or empty, or no line of any file is a usable conversation.
    """
    files = check_inputs(paths)
    assert config.overlong in POLICIES
    if config.seq_length < MIN_WINDOW:
        raise UserError(f"seq_length is {config.seq_length}; conversations need at least {MIN_WINDOW} tokens")
    root = make_root(config, files)
    fingerprint = fingerprint_of(content_digests(files, root / "sources.json"), config, tokenizer, selection)
    final = root / fingerprint[:32]
    found = open_cached(final, fingerprint)
    if found is not None:
        return found
    with only_one(root / f"{final.name}.lock", final, wait_seconds):
        found = open_cached(final, fingerprint)  # another process may have made it while we waited
        if found is None:
            count = workers or config.num_workers or min(usable_cores(), 16)
            partial = final.with_name(f"{final.name}.partial")
            partial.mkdir(exist_ok=True)
            if selection is None:
                tasks = plan_tasks(files, "pieces", partial, config)
            else:
                tasks = selection.tasks(files, partial, config)
            _build(tasks, config, tokenizer, fingerprint, final, count, progress)
            found = open_cached(final, fingerprint)
    assert found is not None
    return found


def make_root(config: Settings, files: Sequence[Path]) -> Path:
    """The cache's folder, made if need be."""
    root = cache_root(config.cache_dir, files[0])
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache folder {root}: {error.strerror}", "Set cache_dir.") from error
    return root


def fingerprint_of(
    digests: Sequence[str], config: Settings, tokenizer: Tokenizer, selection: Selection | None = None
) -> str:
    """SHA-256 over the inputs' contents, the tokenizer, the template and every setting that changes the result."""
    parts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "inputs": list(digests),
        "tokenizer": tokenizer.fingerprint,
        "template": TEMPLATE_VERSION,
        "window": config.seq_length,
        "packing": config.packing,
        "overlong": config.overlong,
    }
    if selection is not None:
        parts["selection"] = [selection.fingerprint, selection.part]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def open_cached(folder: Path, fingerprint: str) -> PackedDataset | None:
    """The finished cache in `folder`, or None when there is none or a file is missing or cut short."""
    try:
        meta = orjson.loads((folder / "meta.json").read_bytes())
        if meta["fingerprint"] != fingerprint:
            return None
        for name, size in meta["sizes"].items():
            if (folder / name).stat().st_size != size:
                return None
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return PackedDataset(folder, meta)


@dataclass(frozen=True)
class Selection:
    """A part of some files' conversations: the decisions on all `files`, in `folder`, and the part to take."""

    files: tuple[Path, ...]
    folder: Path
    fingerprint: str
    part: int

    def tasks(self, own: Sequence[Path], folder: Path, config: Settings) -> list[Task]:
        """The tasks of the files `own`, each with its decisions: those of planning all files together."""
        planned = enumerate(plan_tasks(self.files, "pieces", folder, config))
        return [
            replace(task, decisions=str(self.folder / decisions_name(i)), part=self.part)
            for i, task in planned
            if Path(task.path) in own
        ]


def decisions_name(task: int) -> str:
    """The file of the decisions on the conversations of a task."""
    return f"decisions-{task:05d}.npy"


def plan_tasks(files: Sequence[Path], kind: str, folder: Path | None, config: Settings) -> list[Task]:
    """What there is to do, from the files' sizes and layouts alone. A survey needs no folder."""
    sizes = [path.stat().st_size for path in files]
    step = min(max(-(-sum(sizes) // 16), MIN_TASK_BYTES), MAX_TASK_BYTES)
    tasks: list[Task] = []
    for path, size in zip(files, sizes, strict=True):
        layout = detect(str(path))
        for start in range(0, size, step if layout.splittable else size):
            stop = min(start + step, size) if layout.splittable else size
            suffix = "arrow" if kind == "pieces" else "npz"
            out = "" if folder is None else str(folder / f"pieces-{len(tasks):05d}.{suffix}")
            how = (layout.container, layout.compression, layout.flat)
            tasks.append(Task(kind, str(path), how, start, stop, out, config.seq_length, config.overlong))
    return tasks


def check_inputs(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    files = [Path(path) for path in expand([os.fspath(path) for path in paths])]
    if not files:
        raise UserError("no data files given")
    for path in files:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise UserError(f"data file {path} {what}")
        if path.stat().st_size == 0:
            raise UserError(f"data file {path} is empty", "It should hold one conversation a line.")
        if not os.access(path, os.R_OK):
            raise UserError(f"data file {path} may not be read by this user")
    return files


@contextmanager
def only_one(lock: Path, final: Path, wait_seconds: float) -> Iterator[None]:
    """Holds the lock file, so that one process at a time makes a cache; the kernel frees it when its holder dies."""
    with open(lock, "w") as file:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process has been preparing {final} for over {wait_seconds:.0f} s",
                        "Wait for it to end, or end it, and start again: finished parts are kept.",
                    ) from None
                time.sleep(0.1)
        yield


def _build(
    tasks: Sequence[Task],
    config: Settings,
    tokenizer: Tokenizer,
    fingerprint: str,
    final: Path,
    workers: int,
    progress: Progress | None,
) -> None:
    """Runs the tasks that are not done yet, packs, and gives the folder its name."""
    partial = final.with_name(f"{final.name}.partial")
    files = list(dict.fromkeys(task.path for task in tasks))
    reports: list[dict[str, Any] | None] = [_finished(Path(task.out)) for task in tasks]
    total = sum(task.stop - task.start for task in tasks)
    bytes_done = sum(task.stop - task.start for task, report in zip(tasks, reports, strict=True) if report)

    def done(number: int, report: dict[str, Any]) -> None:
        nonlocal bytes_done
        write_json(_report_path(Path(tasks[number].out)), report)
        reports[number] = report
        bytes_done += tasks[number].stop - tasks[number].start
        if progress is not None:
            progress(bytes_done, total)

    waiting = [(i, task) for i, (task, report) in enumerate(zip(tasks, reports, strict=True)) if report is None]
    run_tasks(waiting, workers, tokenizer, done)
    complete = [report for report in reports if report is not None]
    assert len(complete) == len(tasks)

    account = merge_accounts(tasks, complete, config.overlong, config.seq_length)
    if not account.conversations:
        shutil.rmtree(partial)
        raise UserError(
            f"no usable conversation in {', '.join(files)}: all {account.bad_lines:,} lines are bad",
            "\n  ".join(account.report()[5:]) or "Every line is blank.",
        )
    if not account.pieces and account.conversations_dropped:
        where = ", ".join(f"{count:,} {reason}" for reason, count in account.conversations_dropped.items())
        raise UserError(f"no conversation is left of the {account.conversations:,} in {', '.join(files)}: {where}")
    if not account.tokens_trained:
        raise UserError(
            f"nothing is left to learn from: no answer lies within the first {config.seq_length:,} tokens",
            "Raise seq_length, or use --overlong split.",
        )
    _pack(tasks, config, account, partial)
    account.check()
    for task in tasks:
        _report_path(Path(task.out)).unlink()
    for leftover in partial.glob("*.tmp"):
        leftover.unlink()
    names = [Path(task.out).name for task in tasks]
    meta = {
        "fingerprint": fingerprint,
        "account": account.to_dict(),
        "window": config.seq_length,
        "packing": config.packing,
        "tokenizer": tokenizer.fingerprint,
        "sources": files,
        "shards": [
            {"file": name, "rows": report["rows"], "source": task.path, "line_base": base}
            for name, report, task, base in zip(names, complete, tasks, line_bases(tasks, complete), strict=True)
        ],
        "sizes": {name: (partial / name).stat().st_size for name in [*names, "plan.arrow"]},
    }
    write_json(partial / "meta.json", meta)
    if final.exists():
        shutil.rmtree(final)  # damaged: open_cached refused it
    os.replace(partial, final)


def _report_path(pieces: Path) -> Path:
    return pieces.with_suffix(".json")


def _finished(pieces: Path) -> dict[str, Any] | None:
    """The report of a task that an earlier, interrupted run has finished; None when it has to be done."""
    try:
        report = orjson.loads(_report_path(pieces).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return report if isinstance(report, dict) and pieces.is_file() else None


def line_bases(tasks: Sequence[Task], reports: Sequence[dict[str, Any]]) -> list[int]:
    """How many lines of its file come before each task's range."""
    bases, path, count = [], "", 0
    for task, report in zip(tasks, reports, strict=True):
        count = count if task.path == path else 0
        path = task.path
        bases.append(count)
        count += report["lines"]
    return bases


def merge_accounts(tasks: Sequence[Task], reports: Sequence[dict[str, Any]], overlong: str, window: int) -> Account:
    """The tasks' accounts as one, with file names and true line numbers."""
    account = Account(overlong=overlong, window=window)
    for task, report, base in zip(tasks, reports, line_bases(tasks, reports), strict=True):
        account.merge(Account.from_dict(report["account"]), task.path, base)
    return account


def _column(tasks: Sequence[Task], name: str) -> np.ndarray[Any, Any]:
    """One integer column over all pieces, in order."""
    batches = [batch for task in tasks for batch in open_batches(Path(task.out))]
    parts = [batch.column(name).to_numpy() for batch in batches]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def _pack(tasks: Sequence[Task], config: Settings, account: Account, folder: Path) -> None:
    """Packs the pieces into samples and writes the plan; only lengths are in memory, 24 bytes a piece."""
    tokens_P, supervised_P = _column(tasks, "tokens"), _column(tasks, "supervised")
    row_P = pack(tokens_P, config.seq_length) if config.packing else np.arange(len(tokens_P), dtype=np.int64)
    pieces, offsets = rows_to_pieces(row_P)
    tokens_S = np.add.reduceat(tokens_P[pieces], offsets[:-1], dtype=np.int32)
    supervised_S = np.add.reduceat(supervised_P[pieces], offsets[:-1], dtype=np.int32)
    account.samples = len(tokens_S)
    write_plan(folder / "plan.arrow", tokens_S, supervised_S, pieces, offsets)
