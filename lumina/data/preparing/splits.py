"""Training and evaluation splits of a configuration: given files, or held out; with or without duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from lumina.chat import ChatTokenizer
from lumina.config import UserError, install_command
from lumina.data.cache.files import content_digests
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
from lumina.data.preparing.pool import run_tasks, usable_cores
from lumina.data.preparing.preparation import Selection, cache_lock, decisions_name, make_root, plan_tasks, prepare
from lumina.data.reading.paths import check_inputs, expand
from lumina.files import atomic_folder

DECISIONS_VERSION = 2
EARLIER_DECISIONS = 1  # of version 0.1.0


class Source(Protocol):
    """A training file, or pattern, how often an epoch takes its conversations, and what each record has to be."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def format(self) -> str | None: ...


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
        UserError: as `prepare`; eval_data and eval_fraction together; near-duplicates without rensa.
    """
    if resumed is not None:
        train, evaluation = _prepare_parts(config, tokenizer, progress, earlier=True)
        if train.fingerprint == resumed:
            return train, evaluation
    return _prepare_parts(config, tokenizer, progress, earlier=False)


def _prepare_parts(
    config: SplitSettings, tokenizer: ChatTokenizer, progress: OnProgress | None, earlier: bool
) -> tuple[PackedDataset, PackedDataset | None]:
    assert config.dedup in DEDUP
    common: dict[str, Any] = {"progress": progress, "earlier": earlier}
    train_paths, weights, formats = _sources(config)
    if not config.eval_fraction and config.dedup == "none":
        held_out = prepare(config.eval_data, config, tokenizer, **common) if config.eval_data else None
        train = prepare(train_paths, config, tokenizer, weights=weights, formats=formats, **common)
        return train, held_out
    if config.eval_fraction and config.eval_data:
        raise UserError(
            "both eval_data and eval_fraction are given", "Keep one: eval_fraction holds out of train_data."
        )
    if config.dedup == "near" and not near_available():
        raise UserError("near-duplicates need the package rensa", f"{install_command('dedup')}, or use --dedup exact.")
    train_files = check_inputs(train_paths)
    eval_files = check_inputs(config.eval_data) if config.eval_data else []
    folder, *fingerprints = _decisions_on(train_files, eval_files, formats, config, tokenizer, progress)
    everything = (*train_files, *eval_files)
    evaluation: PackedDataset | None = None
    if eval_files or config.eval_fraction:
        source = eval_files or train_files
        selection = Selection(everything, folder, fingerprints[0], EVAL, formats, fingerprints[1])
        evaluation = prepare(source, config, tokenizer, selection=selection, formats=formats, **common)
    selection = Selection(everything, folder, fingerprints[0], TRAIN, formats, fingerprints[1])
    train = prepare(train_files, config, tokenizer, selection=selection, weights=weights, formats=formats, **common)
    return train, evaluation


def _sources(config: SplitSettings) -> tuple[list[str], dict[str, float], dict[str, str]]:
    """The training paths, and the weights and formats of those in `data`.

    Raises:
        UserError: a file is given twice, so that its weight is not clear.
    """
    paths, weights, formats = expand(config.train_data), {}, {}
    for source in config.data:
        for path in expand([source.path]):
            if path in paths:
                raise UserError(f"training file {path} is given twice", "Give it once, with its weight, under data.")
            paths.append(path)
            weights[str(Path(path))] = source.weight
            if source.format is not None:
                formats[str(Path(path))] = source.format
    return paths, weights, formats


def _decisions_on(
    train_files: Sequence[Path],
    eval_files: Sequence[Path],
    formats: Mapping[str, str],
    config: SplitSettings,
    tokenizer: ChatTokenizer,
    progress: OnProgress | None,
) -> tuple[Path, str, str]:
    """The folder of decisions on all conversations, made if it is not there, its fingerprint, and the one that version
    0.1.0 gave such decisions."""
    files = [*train_files, *eval_files]
    root = make_root(config, files)
    digests = content_digests(files, root / "sources.json")
    settings: list[Any] = [len(train_files), config.eval_fraction, config.dedup, digests]
    settings += [dict(formats)] if formats else []
    settings += [added_versions()] if added_versions() else []
    fingerprint, earlier = (
        hashlib.sha256(orjson.dumps([version, *settings])).hexdigest()
        for version in (DECISIONS_VERSION, EARLIER_DECISIONS)
    )
    final = root / f"curation-{fingerprint[:32]}"
    with cache_lock(root / f"{final.name}.lock", final, 3600.0):
        if not final.exists():
            with atomic_folder(final) as scratch:
                _write_decisions(files, len(train_files), formats, config, tokenizer, scratch, progress)
    return final, fingerprint, earlier


def _write_decisions(
    files: Sequence[Path],
    train_count: int,
    formats: Mapping[str, str],
    config: SplitSettings,
    tokenizer: ChatTokenizer,
    folder: Path,
    progress: OnProgress | None,
) -> None:
    """Gathers every conversation's signature in parallel, decides, and writes a file of decisions for each task."""
    kind = "near signatures" if config.dedup == "near" else "signatures"
    tasks = plan_tasks(files, kind, folder, config, formats)
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
    in_eval = set(map(str, files[train_count:]))
    given_N = np.concatenate(
        [
            np.full(len(signatures.exact), EVAL if task.path in in_eval else TRAIN, dtype=np.uint8)
            for task, signatures in zip(tasks, found, strict=True)
        ]
    )
    decided_N = decide(join_signatures(found), given_N, config.eval_fraction, config.dedup)
    bounds = np.cumsum([len(signatures.exact) for signatures in found])[:-1]
    for number, decided in enumerate(np.split(decided_N, bounds)):
        np.save(folder / decisions_name(number), decided)
