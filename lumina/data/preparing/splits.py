"""Training and evaluation splits of a configuration: given files, or held out; with or without duplicates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson

from lumina.chat import ChatTokenizer, Conversation
from lumina.config import UserError, install_command
from lumina.data.account import Account
from lumina.data.cache.files import Contents
from lumina.data.converting.columns import Columns, by_file
from lumina.data.formats import added_versions
from lumina.data.loading.dataset import PackedDataset
from lumina.data.preparing.building import OnProgress, PrepareSettings
from lumina.data.preparing.deduplication import (
    DEDUP,
    EVAL,
    TRAIN,
    Signatures,
    decide,
    join_signatures,
    near_available,
)
from lumina.data.preparing.hold_out import explain
from lumina.data.preparing.pool import run_tasks, usable_cores
from lumina.data.preparing.preparation import (
    EARLIER_FORMATS,
    Selection,
    cache_lock,
    decisions_name,
    find_earlier,
    make_root,
    plan_tasks,
    prepare,
)
from lumina.data.preparing.progress import LoggedProgress
from lumina.data.preparing.worker import Task, read_blocks
from lumina.data.reading.paths import check_inputs, expand
from lumina.files import atomic_folder, write_json

DECISIONS_VERSION = 3
EARLIER_DECISIONS = {3: 2, 2: 1}  # by the version of EARLIER_FORMATS
HELD_OUT = "hold-out.json"  # beside the decisions: a note on how the share asked was met


class Source(Protocol):
    """A training file, or pattern, how often an epoch takes its conversations, what each record has to be, and which
    columns its fields stand in."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def format(self) -> str | None: ...
    @property
    def columns(self) -> Mapping[str, str] | None: ...


class SplitSettings(PrepareSettings, Protocol):
    """What the splits need of the configuration."""

    @property
    def train_data(self) -> Sequence[str]: ...
    @property
    def data(self) -> Sequence[Source]: ...
    @property
    def eval_data(self) -> Sequence[str]: ...
    @property
    def eval_fraction(self) -> float: ...
    @property
    def dedup(self) -> str: ...


def prepare_splits(
    config: SplitSettings, tokenizer: ChatTokenizer, *, progress: OnProgress | None = None, resumed: str | None = None
) -> tuple[PackedDataset, PackedDataset | None]:
    """(training set, evaluation set or None). `resumed`: fingerprint of the training set of a run to go on with; the
    caches that an earlier version made for it are taken where they are the ones.

    Training files are train_data, each taken once an epoch, and the weighted sources of `data`. With `eval_fraction`,
    that share of their groups is held out; with `dedup`, duplicates are removed from both sets together. The accounts
    say how many conversations went where.

    Raises:
        UserError: as `prepare`; eval_data and eval_fraction together; near-duplicates without rensa; a share that the
            groups do not allow.
    """
    if resumed is not None:
        for version in EARLIER_FORMATS:
            found = _earlier_splits(config, tokenizer, version, resumed)
            if found is not None:
                return found
    assert config.dedup in DEDUP
    progress = progress or LoggedProgress()
    train_paths, weights, formats, columns = _sources(config)
    how: dict[str, Any] = {"progress": progress, "formats": formats, "columns": columns}
    if not config.eval_fraction and config.dedup == "none":
        held_out = prepare(config.eval_data, config, tokenizer, progress=progress) if config.eval_data else None
        return prepare(train_paths, config, tokenizer, weights=weights, **how), held_out
    if config.eval_fraction and config.eval_data:
        raise UserError(
            "both eval_data and eval_fraction are given", "Keep one: eval_fraction holds out of train_data."
        )
    if config.dedup == "near" and not near_available():
        raise UserError("near-duplicates need the package rensa", f"{install_command('dedup')}, or use --dedup exact.")
    unused = frozenset(path for path, weight in weights.items() if weight == 0)
    files = _Files(check_inputs(train_paths), check_inputs(config.eval_data) if config.eval_data else [], unused)
    folder, fingerprint, contents = _decisions_on(files, formats, columns, config, tokenizer, progress)
    evaluation: PackedDataset | None = None
    if files.eval or config.eval_fraction:
        chosen = Selection(files.all, folder, fingerprint, EVAL, formats, columns, contents=contents)
        evaluation = prepare(files.eval or files.train, config, tokenizer, selection=chosen, **how)
    chosen = Selection(files.all, folder, fingerprint, TRAIN, formats, columns, contents=contents)
    train = prepare(files.train, config, tokenizer, selection=chosen, weights=weights, **how)
    if (folder / HELD_OUT).exists():
        train.account["notes"].append(orjson.loads((folder / HELD_OUT).read_bytes())["note"])
    return train, evaluation


class _Files(NamedTuple):
    """`unused`: training files of weight 0, of which none is held out and none has the place of its duplicates."""

    train: list[Path]
    eval: list[Path]
    unused: frozenset[str] = frozenset()

    @property
    def all(self) -> tuple[Path, ...]:
        return (*self.train, *self.eval)


def _earlier_splits(
    config: SplitSettings, tokenizer: ChatTokenizer, version: int, resumed: str
) -> tuple[PackedDataset, PackedDataset | None] | None:
    """Both sets as an earlier version made them, when their caches are there and the training set is the one that was
    trained on. Nothing is decided anew: a split that is refused today goes on as it was."""
    train_paths, weights, formats, columns = _sources(config)

    def find(paths: Sequence[Any], **how: Any) -> PackedDataset | None:
        return find_earlier(paths, config, tokenizer, version, columns=columns, **how)

    if not config.eval_fraction and config.dedup == "none":
        train = find(train_paths, weights=weights, formats=formats)
        if train is None or train.fingerprint != resumed:
            return None
        held_out = find(config.eval_data) or prepare(config.eval_data, config, tokenizer) if config.eval_data else None
        return train, held_out
    files = _Files(check_inputs(train_paths), check_inputs(config.eval_data) if config.eval_data else [])
    root = make_root(config, files.all)
    contents = Contents(files.all, root / "sources.json")
    earlier = {version: _fingerprint(files, contents, formats, columns, config, EARLIER_DECISIONS[version])}
    sides = {split: Selection(files.all, root, "", split, formats, columns, earlier) for split in (TRAIN, EVAL)}
    train = find(files.train, selection=sides[TRAIN], weights=weights, formats=formats)
    if train is None or train.fingerprint != resumed:
        return None
    if not files.eval and not config.eval_fraction:
        return train, None
    evaluation = find(files.eval or files.train, selection=sides[EVAL], formats=formats)
    return None if evaluation is None else (train, evaluation)


def _sources(
    config: SplitSettings,
) -> tuple[list[str], dict[str, float], dict[str, str], dict[str, Columns]]:
    """The training paths, and the weights, formats and columns of those in `data`.

    Raises:
        UserError: a file is given twice, so that its weight is not clear.
    """
    paths, weights, formats, columns = expand(config.train_data), {}, {}, {}
    for source in config.data:
        for path in expand([source.path]):
            if path in paths:
                raise UserError(f"training file {path} is given twice", "Give it once, with its weight, under data.")
            paths.append(path)
            weights[str(Path(path))] = source.weight
            if source.format is not None:
                formats[str(Path(path))] = source.format
            if source.columns is not None:
                columns[str(Path(path))] = source.columns
    return paths, weights, formats, columns


def _fingerprint(
    files: _Files,
    contents: Contents,
    formats: Mapping[str, str],
    columns: Mapping[str, Columns],
    config: SplitSettings,
    version: int,
) -> str:
    """SHA-256 over what decisions on all conversations of these files depend on."""
    settings: list[Any] = [version, len(files.train), config.eval_fraction, config.dedup, contents.digests]
    settings += [dict(formats)] if formats else []
    mapped = by_file(map(str, files.all), columns, config.columns)
    settings += [["columns", *(dict(mapped.get(str(path), {})) for path in files.all)]] if mapped else []
    settings += [added_versions()] if added_versions() else []
    settings += [["unused", *(str(path) in files.unused for path in files.all)]] if files.unused else []
    return hashlib.sha256(orjson.dumps(settings)).hexdigest()


def _decisions_on(
    files: _Files,
    formats: Mapping[str, str],
    columns: Mapping[str, Columns],
    config: SplitSettings,
    tokenizer: ChatTokenizer,
    progress: OnProgress | None,
) -> tuple[Path, str, Contents]:
    """The folder of decisions on all conversations, made if it is not there, its fingerprint, and the contents of the
    files that they were taken on."""
    root = make_root(config, files.all)
    contents = Contents(files.all, root / "sources.json")
    fingerprint = _fingerprint(files, contents, formats, columns, config, DECISIONS_VERSION)
    final = root / f"curation-{fingerprint[:32]}"
    with cache_lock(root / f"{final.name}.lock", final, math.inf):
        if not final.exists():
            with atomic_folder(final) as scratch:
                _write_decisions(files, formats, columns, config, tokenizer, scratch, progress)
                contents.check_all()
    return final, fingerprint, contents


def _write_decisions(
    files: _Files,
    formats: Mapping[str, str],
    columns: Mapping[str, Columns],
    config: SplitSettings,
    tokenizer: ChatTokenizer,
    folder: Path,
    progress: OnProgress | None,
) -> None:
    """Gathers every conversation's signature in parallel, decides, and writes a file of decisions for each task.

    Raises:
        UserError: the groups of conversations allow no evaluation set of about the size asked.
    """
    kind = "near signatures" if config.dedup == "near" else "signatures"
    tasks = plan_tasks(files.all, kind, folder, config, formats, columns)
    total, seen = sum(task.stop - task.start for task in tasks), 0

    def done(number: int, report: object) -> None:
        nonlocal seen
        seen += tasks[number].stop - tasks[number].start
        if progress is not None:
            progress(seen, total)

    run_tasks(list(enumerate(tasks)), config.num_workers or min(usable_cores(), 16), tokenizer, done)
    found = []
    for task in tasks:
        with np.load(task.out) as loaded:
            found.append(Signatures(**{name: loaded[name] for name in Signatures._fields}))
        Path(task.out).unlink()
    in_eval = set(map(str, files.eval))
    given_N = np.concatenate(
        [
            np.full(len(signatures.exact), EVAL if task.path in in_eval else TRAIN, dtype=np.uint8)
            for task, signatures in zip(tasks, found, strict=True)
        ]
    )
    used = [
        np.full(len(signatures.exact), task.path not in files.unused)
        for task, signatures in zip(tasks, found, strict=True)
    ]
    used_N = np.flatnonzero(np.concatenate(used))
    joined = Signatures._make(column[used_N] for column in join_signatures(found))
    split_N = np.full(len(given_N), TRAIN, dtype=np.uint8)
    split_N[used_N], outcome = decide(joined, given_N[used_N], config.eval_fraction, config.dedup)
    counts = [len(signatures.exact) for signatures in found]
    if outcome is not None and outcome.conversations and not outcome.by_hash:
        why, remedy = explain(
            outcome, joined.group, joined.prompt, lambda number: _conversation(tasks, counts, int(used_N[number]))
        )
        if outcome.refused:
            raise UserError(f"eval_fraction {config.eval_fraction:g} cannot be held out: {why}", remedy)
        write_json(folder / HELD_OUT, {"note": f"{outcome.note()}; {why}. {remedy}"})
    for number, decided in enumerate(np.split(split_N, np.cumsum(counts)[:-1])):
        np.save(folder / decisions_name(number), decided)


def _conversation(tasks: Sequence[Task], counts: Sequence[int], number: int) -> Conversation:
    """The conversation with this number among all that the tasks read."""
    for task, count in zip(tasks, counts, strict=True):
        if number < count:
            for block in read_blocks(task, Account()):
                if number < len(block.conversations):
                    return block.conversations[number]
                number -= len(block.conversations)
        number -= count
    raise AssertionError("no such conversation")
