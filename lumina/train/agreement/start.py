"""What must be the same on every rank before the first step: settings, versions and code, data and weights.

Ranks that differ would train without a word: with two seeds each has its own order of samples, with two learning rates
or another file behind the same path the updates are no step of any run. Each says what it goes by, rank 0 compares, and
what differs is named with the ranks and their hosts. In the same exchange every node leaves a file in the run's output
folder, which rank 0 must find: checkpoints are written by every rank, and named by rank 0.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lumina import checkpoint
from lumina.cluster import own_launch
from lumina.config import FAMILIES, FORMATS, OBJECTIVES, SCHEDULES, Config, UserError
from lumina.data import Samples
from lumina.files import file_sha256
from lumina.processes import machine
from lumina.train.agreement.store import gathered, refuse_together, together
from lumina.train.deepspeed import Ranks

#: Settings that say where and how a rank prepares, whose contents are compared instead, or which change no step.
OWN = frozenset({"cache_dir", "num_workers", "train_data", "eval_data", "data", "tokenizer", "ds_config", "live_view"})
OWN |= {"trained_seq_length"}  # where it is counted from, rope_scaling is compared
_PACKAGES = ("torch", "deepspeed", "triton", "numpy", "pyarrow", "tokenizers", "tiktoken", "safetensors", "jinja2")
_VISIBLE = 10.0  # seconds in which a file must be seen on another machine: network file systems cache
_MOST = 8  # differences that are named
_CONTENTS = (".arrow", ".npy")  # files that samples are read from


log = logging.getLogger("lumina")


@dataclass(frozen=True)
class _Answer:
    """One rank's word before the start. facts: what must be the same, by name; marks: the files that it left for rank 0
    to find, by folder; refusal: what it met in its own files."""

    host: str
    facts: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)
    refusal: UserError | None = None


def refuse_start(refusal: UserError, ranks: Ranks) -> None:
    """Raise this rank's refusal on every rank: the others would wait for it. Takes the place of `agree_on_start`."""
    gathered(ranks, "starting", _Answer(socket.gethostname(), refusal=refusal), _compare)


def agree_on_start(config: Config, ranks: Ranks) -> None:
    """Raises the same UserError on every rank where their settings, versions or code differ, where one of them has
    refused its own, or where the run's folder is not one that all nodes share."""
    if ranks.world == 1:
        return
    marks: dict[str, str] = {}
    made: list[Path] = []
    try:
        refusal = ranks.refusal or _leave_marks(config, ranks, marks, made)
        gathered(ranks, "starting", _Answer(socket.gethostname(), _facts(config), marks, refusal), _compare)
    except UserError:
        for folder in reversed(made):
            with suppress(OSError):  # not empty
                (folder / _name(ranks)).unlink(missing_ok=True)
                folder.rmdir()
        raise
    finally:
        for folder_name, mark in marks.items():
            with suppress(OSError):
                Path(folder_name, mark).unlink(missing_ok=True)


def agree_on_launch(ranks: Ranks, folder: Path) -> str | None:
    """The launch that this start of the run in `folder` belongs to, the same on every rank; None for what is started
    once. torchrun's agents have no name in common: it is the launch of the start before where one of them made that."""

    def conclude(launches: Sequence[str | None]) -> str | None:
        names = sorted({name for name in launches if name is not None})
        before = checkpoint.last_launch(folder)
        again = before is not None and not set(names).isdisjoint([before, *before.split()])
        return before if again else " ".join(names) or None

    return gathered(ranks, "starting", own_launch(), conclude)


def agree_on_data(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """The same for what is known later: the prepared data, and the weights that the run begins with."""
    answer = _Answer(socket.gethostname(), {name: _text(value) for name, value in facts.items()})
    gathered(ranks, "opening the data", answer, _compare)


def agree_on_contents(ranks: Ranks, datasets: Sequence[Samples]) -> None:
    """Raises UserError on every rank where ranks share rows and the files of `datasets`, of one fingerprint, are not
    the same bytes, or not known: each reads a row for itself, and what is damaged for one of them is another row, of
    another length, for which the others would wait. Files that are one on all machines are not read; those that are one
    on a machine are read by its first rank alone."""
    if ranks.sequence == 1:
        return
    for one in datasets:
        if not hasattr(one, "folder"):
            raise UserError(
                f"ranks that share rows compare the files that these are read from, and {type(one).__name__} of "
                f"{type(one).__module__} has no `folder`",
                "Set sequence_parallel_size to 1, or see docs/api.md.",
            )

    def look() -> tuple[list[Path], list[os.stat_result]]:
        files = [path for one in datasets for path in sorted(one.folder.iterdir()) if path.suffix in _CONTENTS]
        return files, [path.stat() for path in files]

    files, found = together(ranks, "opening the data", look)
    places = [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found]
    readers = gathered(ranks, "opening the data", (machine(), places), readers_of)
    if readers is None:
        return
    size = sum(one.st_size for one in found)
    if ranks.main:
        log.info("comparing the %.2f GB of prepared data that the machines have each for itself", size / 1e9)

    def digest() -> str | None:
        if readers[ranks.rank] != ranks.rank:
            return None
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:16]

    found_here = together(ranks, "comparing the prepared data", digest)
    answer = _Answer(socket.gethostname(), {f"contents of the prepared data ({len(files)} files)": str(found_here)})
    gathered(ranks, "comparing the prepared data", answer, lambda all_: _compare(_as_read(all_, readers)))


def readers_of(found: Sequence[tuple[str, Any]]) -> list[int] | None:
    """The rank that reads for each rank: the first on its machine that has the same files; None where all have."""
    if all(places == found[0][1] for _, places in found):
        return None
    return [found.index(one) for one in found]


def _as_read(answers: Sequence[_Answer], readers: Sequence[int]) -> list[_Answer]:
    """Each rank's answer, with what its reader found."""
    return [replace(answer, facts=answers[reader].facts) for answer, reader in zip(answers, readers, strict=True)]


def manifest_digest(saved: Path | None) -> str | None:
    """The digest of a checkpoint's manifest as this rank finds it; None without one."""
    with suppress(OSError):
        return None if saved is None else file_sha256(saved / checkpoint.MANIFEST)
    return None


# --- One rank's word ------------------------------------------------------------------------------


def _facts(config: Config) -> dict[str, str]:
    facts: dict[str, Any] = {name: value for name, value in config.model_dump(mode="json").items() if name not in OWN}
    if config.ds_config is not None:
        facts["the file of ds_config"] = _digest_of(Path(config.ds_config))
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and script.endswith(".py"):
        facts[f"the code of {Path(script).name}"] = _digest_of(Path(script))
    return {**{name: _text(value) for name, value in facts.items()}, **_installed()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _digest_of(path: Path) -> str | None:
    with suppress(OSError):
        return file_sha256(path)[:16]
    return None


@functools.cache
def _installed() -> Mapping[str, str]:
    """The versions and the code that this rank runs."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2]), "CUDA": str(torch.version.cuda)}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    for registry in (FORMATS, FAMILIES, SCHEDULES, OBJECTIVES):
        for point in importlib.metadata.entry_points(group=registry.group):
            if point.dist is not None:
                found[point.dist.name] = point.dist.version
    versions = {f"version of {name}": version for name, version in found.items()}
    return {**versions, "the code of lumina": _code()}


def _code() -> str:
    """A digest of the package's sources: two clones of one version need not be the same."""
    digest = hashlib.sha256()
    for package in ("lumina", "lumina.kernels"):
        spec = find_spec(package)
        for root in sorted((spec and spec.submodule_search_locations) or ()):
            for path in sorted(Path(root).rglob("*")):
                if path.suffix in (".py", ".c"):
                    digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _name(ranks: Ranks) -> str:
    return f".lumina-start-{ranks.start}-{ranks.rank}"


def _leave_marks(config: Config, ranks: Ranks, marks: dict[str, str], made: list[Path]) -> UserError | None:
    """Leave a file in every folder that the ranks of several machines write to: by the first rank of each. Returns what
    keeps it from that, for backups only where the run begins and no later try could do better; `made`: the folders that
    were not there."""
    if ranks.local_rank != 0 or ranks.local_world == ranks.world:
        return None
    for name in ("output_dir", "backup_dir"):
        folder = getattr(config, name)
        if folder is None:
            continue
        try:
            path = Path(folder)
            missing = [one for one in (path, *path.parents) if not one.exists()]
            path.mkdir(parents=True, exist_ok=True)
            made += reversed(missing)
            (path / _name(ranks)).touch()
        except OSError as error:
            found = checkpoint.unwritable(path)
            why = f"{name} {folder} cannot be written: {found or error.strerror or error}"
            may_pass = found is None or found.retry
            if name == "backup_dir" and (may_pass or _has_begun(config.output_dir, config.experiment_name)):
                log.warning("%s: %s; each backup that is due is tried", socket.gethostname(), why)
                continue
            return UserError(why, _remedy(name))
        marks[str(folder)] = _name(ranks)
    return None


def _has_begun(output_dir: str, experiment_name: str) -> bool:
    return checkpoint.has_begun(Path(output_dir, experiment_name))


def _remedy(name: str) -> str:
    flag = "--output-dir" if name == "output_dir" else "--set backup_dir=FOLDER"
    return f"Mount the same file system there on every node, or give {flag} one that all of them share."


# --- What rank 0 makes of them --------------------------------------------------------------------


def _compare(answers: Sequence[_Answer]) -> None:
    """Raises UserError for what differs; the folder before the settings, which may have been read from it."""
    refuse_together([(answer.host, answer.refusal) for answer in answers])
    different = differing([answer.facts for answer in answers])
    if not different.keys() & {"output_dir", "backup_dir"}:
        _refuse_unshared(answers)
    if not different:
        return
    lines = [f"  {name}: {_by_rank(values, answers)}" for name, values in list(different.items())[:_MOST]]
    if len(different) > _MOST:
        lines.append(f"  and {len(different) - _MOST} more")
    raise UserError(
        "\n".join([f"the {len(answers)} ranks are not of one run:", *lines]),
        "Start every rank with the same command line, files and installation.",
    )


def differing(facts: Sequence[Mapping[str, str]]) -> dict[str, list[str | None]]:
    """What is not the same everywhere: each rank's value, None for one that has none, by name."""
    names = list(dict.fromkeys(name for one in facts for name in one))
    values = {name: [one.get(name) for one in facts] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def _by_rank(values: Sequence[str | None], answers: Sequence[_Answer]) -> str:
    """`5 on rank 0 (n0), 6 on ranks 1, 2 (n1)`, the most frequent value first."""
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    parts = []
    for value, holders in sorted(ranks.items(), key=lambda item: -len(item[1])):
        some = ", ".join(map(str, holders[:4])) + ("" if len(holders) <= 4 else f" and {len(holders) - 4} more")
        hosts = list(dict.fromkeys(answers[rank].host for rank in holders))
        where = ", ".join(hosts[:3]) + ("" if len(hosts) <= 3 else ", …")
        shown = "nothing" if value is None else value if len(value) <= 60 else value[:57] + "…"
        parts.append(f"{shown} on rank{'s' if len(holders) > 1 else ''} {some} ({where})")
    return ", ".join(parts)


def _refuse_unshared(answers: Sequence[_Answer]) -> None:
    """UserError where a node's file is not to be seen here. A warning for the backups of a run that began before, which
    they do not end; nothing where none can be written here at present, as was said."""
    facts, deadline = answers[0].facts, time.monotonic() + _VISIBLE
    wanted = [(rank, folder, mark) for rank, one in enumerate(answers) for folder, mark in one.marks.items()]
    for rank, folder, mark in wanted:
        backups = facts.get("output_dir") != folder
        while not Path(folder, mark).exists():
            if backups and folder not in answers[0].marks:
                break
            if time.monotonic() <= deadline:
                time.sleep(0.1)
                continue
            name = "backup_dir" if backups else "output_dir"
            what = (
                f"{name} {Path(folder).absolute()} is not one folder of all machines: a file that rank {rank} wrote "
                f"there on {answers[rank].host} is not to be seen on {answers[0].host}"
            )
            if backups and _has_begun(facts["output_dir"], facts["experiment_name"]):
                log.warning("%s: no backup can be completed", what)
                break
            raise UserError(f"{what}, so no checkpoint could be completed", _remedy(name))
