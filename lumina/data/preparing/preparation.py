"""Conversation files -> the packed cache: found again by fingerprint, built in parallel, named only when whole.

    CACHE/FINGERPRINT/        pieces-00000.arrow … (chunks), plan.arrow, meta.json
    CACHE/FINGERPRINT.partial the same while it is being made: finished tasks are kept over a kill and not done again
    CACHE/sources.json        content hashes of the inputs by path, size and time, so that reuse reads no input

The tasks depend on the input alone, never on the number of workers, so the result is byte-identical however it came
about.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from lumina.chat import ChatTokenizer
from lumina.config import UserError
from lumina.data.cache.files import Contents, cache_root
from lumina.data.converting.columns import Columns, by_file, check_columns
from lumina.data.formats import added_versions, tests_by_precedence
from lumina.data.loading.dataset import PackedDataset
from lumina.data.preparing.building import OnProgress, PrepareSettings, build
from lumina.data.preparing.chunking import MIN_SEQ_LENGTH, POLICIES
from lumina.data.preparing.pool import usable_cores
from lumina.data.preparing.worker import Task
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import check_inputs

log = logging.getLogger("lumina.data")

FORMAT_VERSION = 4
# 3: version 0.2.0, which kept chunks without a supervised token, and split conversations in languages without spaces
# badly; 2: 0.1.0, which left fields out.
EARLIER_FORMATS = (3, 2)
# A task is a 16th of the input within these bounds: small files still feed several workers, large ones make few files.
MIN_TASK_BYTES, MAX_TASK_BYTES = 1 << 20, 64 << 20


def prepare(
    paths: Sequence[str | os.PathLike[str]],
    config: PrepareSettings,
    tokenizer: ChatTokenizer,
    *,
    workers: int | None = None,
    progress: OnProgress | None = None,
    wait_seconds: float = math.inf,
    selection: Selection | None = None,
    weights: Mapping[str, float] | None = None,
    formats: Mapping[str, str] | None = None,
    columns: Mapping[str, Columns] | None = None,
) -> PackedDataset:
    """The packed data set of these files, from the cache when nothing has changed.

    Args:
        paths: files of conversations, read in this order.
        workers: processes; None takes config.num_workers, else the usable cores (at most 16).
        wait_seconds: how long to wait for another process that is preparing the same data: as long as it lives.
        selection: the split of the conversations to take; None takes all.
        weights: how often an epoch takes the conversations of a file; 1 for files not named. See mixing.py.
        formats: what every record of a file has to be (a name of FORMATS); files not named are told record by record.
        columns: of a file, the columns in which the formats' fields stand; of files not named, config.columns.

    Raises:
        UserError: a file is missing or empty, a column that it has not is mapped, no line of any file is a usable
            conversation, or the chat template of an imported model cannot be trained with.
    """
    files = check_inputs(paths)
    tokenizer.check_trainable()
    assert config.overlong in POLICIES
    if config.seq_length < MIN_SEQ_LENGTH:
        raise UserError(f"seq_length is {config.seq_length}; conversations need at least {MIN_SEQ_LENGTH} tokens")
    root = make_root(config, files)
    mapped = by_file(map(str, files), columns or {}, config.columns)
    contents = Contents(files, root / "sources.json")
    if selection is not None and selection.contents is not None:
        selection.contents.check_all()
    final, fingerprint = _place(
        files, contents, root, config, tokenizer, selection, weights or {}, formats or {}, mapped
    )
    found = open_cached(final, fingerprint)
    if found is not None:
        return found
    with cache_lock(root / f"{final.name}.lock", final, wait_seconds):
        found = open_cached(final, fingerprint)  # another process may have made it while we waited
        if found is None:
            count = workers or config.num_workers or min(usable_cores(), 16)
            try:
                partial = final.with_name(f"{final.name}.partial")
                partial.mkdir(exist_ok=True)
                if selection is None:
                    tasks = plan_tasks(files, "chunks", partial, config, formats, columns)
                else:
                    tasks = selection.tasks(files, partial, config)
                build(tasks, contents, config, tokenizer, fingerprint, final, count, progress, weights)
            except OSError as error:
                raise UserError(f"cannot make the cache {final}: {error.strerror or error}") from error
            found = open_cached(final, fingerprint)
    assert found is not None
    return found


def find_earlier(
    paths: Sequence[str | os.PathLike[str]],
    config: PrepareSettings,
    tokenizer: ChatTokenizer,
    version: int,
    *,
    selection: Selection | None = None,
    weights: Mapping[str, float] | None = None,
    formats: Mapping[str, str] | None = None,
    columns: Mapping[str, Columns] | None = None,
) -> PackedDataset | None:
    """The cache that a version of EARLIER_FORMATS made of these files and settings, None if it is not there: a run is
    resumed on what it was trained on. Arguments and errors as of `prepare`."""
    files = check_inputs(paths)
    root = make_root(config, files)
    mapped = by_file(map(str, files), columns or {}, config.columns)
    contents = Contents(files, root / "sources.json")
    return open_cached(
        *_place(files, contents, root, config, tokenizer, selection, weights or {}, formats or {}, mapped, version)
    )


def _place(
    files: Sequence[Path],
    contents: Contents,
    root: Path,
    config: PrepareSettings,
    tokenizer: ChatTokenizer,
    selection: Selection | None,
    weights: Mapping[str, float],
    formats: Mapping[str, str],
    columns: Mapping[str, Columns],
    version: int | None = None,
) -> tuple[Path, str]:
    """The folder of a cache, and its fingerprint."""
    by_weight = [weights.get(str(path), 1.0) for path in files]
    fixed = [formats.get(str(path), "") for path in files]
    moved = [dict(columns.get(str(path), {})) for path in files]
    fingerprint = fingerprint_of(contents.digests, config, tokenizer, selection, by_weight, fixed, moved, version)
    return root / fingerprint[:32], fingerprint


def make_root(config: PrepareSettings, files: Sequence[Path]) -> Path:
    """Creates the cache's folder. Returns its path."""
    root = cache_root(config.cache_dir, files[0])
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {root}: {error.strerror}", "Choose another --cache-dir."
        ) from error
    return root


def fingerprint_of(
    digests: Sequence[str],
    config: PrepareSettings,
    tokenizer: ChatTokenizer,
    selection: Selection | None = None,
    weights: Sequence[float] = (),
    formats: Sequence[str] = (),
    columns: Sequence[Columns] = (),
    version: int | None = None,
) -> str:
    """SHA-256 over the inputs' contents, the tokenizer, the template and every setting that changes the result.
    `version`: one of EARLIER_FORMATS, None for this one."""
    version = FORMAT_VERSION if version is None else version
    current = tokenizer.fingerprint, tokenizer.template_version
    fingerprint, template = current if version == FORMAT_VERSION else tokenizer.earlier
    determinants: dict[str, Any] = {
        "format": version,
        "inputs": list(digests),
        "tokenizer": fingerprint,
        "template": template,
        "window": config.seq_length,
        "packing": config.packing,
        "overlong": config.overlong,
    }
    if version >= 4 and config.overlong == "split":
        determinants["overlong context"] = config.overlong_context
    if selection is not None:
        chosen = selection.fingerprint if version == FORMAT_VERSION else selection.earlier[version]
        determinants["selection"] = [chosen, selection.split]
    if any(weight != 1 for weight in weights):
        determinants["weights"] = list(weights)
    if any(formats):
        determinants["formats"] = list(formats)
    if any(columns):
        determinants["columns"] = [dict(mapping) for mapping in columns]
    if added_versions():
        determinants["added formats"] = added_versions()
    return hashlib.sha256(orjson.dumps(determinants, option=orjson.OPT_SORT_KEYS)).hexdigest()


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
    """One split of some files' conversations: the decisions on all `files`, in `folder`, and the split to take."""

    files: tuple[Path, ...]
    folder: Path
    fingerprint: str
    split: int
    formats: Mapping[str, str]
    columns: Mapping[str, Columns]
    earlier: Mapping[int, str] = field(default_factory=dict)  # the decisions' fingerprint in each of EARLIER_FORMATS
    contents: Contents | None = None  # of `files`, on which the decisions were taken

    def tasks(self, own: Sequence[Path], folder: Path, config: PrepareSettings) -> list[Task]:
        """The tasks of the files `own`, each with its decisions: those of planning all files together."""
        planned = enumerate(plan_tasks(self.files, "chunks", folder, config, self.formats, self.columns))
        return [
            replace(task, decisions=str(self.folder / decisions_name(i)), split=self.split)
            for i, task in planned
            if Path(task.path) in own
        ]


def decisions_name(task: int) -> str:
    """The file of the decisions on the conversations of a task."""
    return f"decisions-{task:05d}.npy"


def plan_tasks(
    files: Sequence[Path],
    kind: str,
    folder: Path | None,
    config: PrepareSettings,
    formats: Mapping[str, str] | None = None,
    columns: Mapping[str, Columns] | None = None,
) -> list[Task]:
    """The tasks of these files, from their sizes and layouts alone: byte ranges where a file can be split.

    Statistics need no folder. UserError where another package's data format does not load, or a column is mapped that a
    file has not: found here, not in a worker.
    """
    tests_by_precedence()
    sizes = [path.stat().st_size for path in files]
    step = min(max(-(-sum(sizes) // 16), MIN_TASK_BYTES), MAX_TASK_BYTES)
    tasks: list[Task] = []
    for path, size in zip(files, sizes, strict=True):
        layout, given = detect(str(path)), (formats or {}).get(str(path), "")
        moved = (columns or {}).get(str(path), config.columns)
        layout = layout._replace(flat=layout.flat and given in ("", "oasst") and not moved)
        if moved:
            check_columns(str(path), layout, moved)
        for start in range(0, size, step if layout.splittable else size):
            stop = min(start + step, size) if layout.splittable else size
            suffix = "arrow" if kind == "chunks" else "npz"
            out = "" if folder is None else str(folder / f"pieces-{len(tasks):05d}.{suffix}")
            how = (layout.container, layout.compression, layout.flat, layout.encoding)
            chunking = (config.seq_length, config.overlong, config.overlong_context)
            task = Task(kind, str(path), how, start, stop, out, *chunking, format=given)
            tasks.append(replace(task, columns=tuple(moved.items())))
    return tasks


@contextmanager
def cache_lock(lock: Path, final: Path, wait_seconds: float) -> Iterator[None]:
    """File lock: one process at a time makes a cache; the kernel frees it when its holder dies.

    Raises:
        UserError: the folder cannot be written, or another process holds the lock for longer than `wait_seconds`.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(lock, "w", encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"cannot write the cache: {error.strerror}: {lock}", "Choose another --cache-dir."
            ) from error
        deadline, told = time.monotonic() + wait_seconds, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process has been preparing {final} for over {wait_seconds:.0f} s",
                        "Wait for it to end, or end it, and start again: finished tasks are kept.",
                    ) from None
                if not told:
                    most = "" if math.isinf(wait_seconds) else f", at most {wait_seconds:.0f} s"
                    log.warning("waiting for another process that prepares %s%s", final, most)
                    told = True
                time.sleep(0.1)
            except OSError as error:  # a network file system without locks
                log.warning("no lock on %s (%s): do not prepare it from two processes at once", final, error.strerror)
                break
        yield
