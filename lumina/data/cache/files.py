"""The data cache: where it lives, and the hashes of the files that were read, kept so that none is read twice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import orjson

from lumina.files import file_sha256, write_json


def content_digests(paths: Sequence[Path], index: Path) -> list[str]:
    """SHA-256 of each file, looked up in `index` by (path, size, mtime, inode) so that an unchanged file of any size
    is not read again. A damaged or unwritable index costs time only."""
    known: dict[str, str] = {}
    try:
        loaded = orjson.loads(index.read_bytes())
        if isinstance(loaded, dict):
            known = loaded
    except (OSError, orjson.JSONDecodeError):
        pass
    digests, changed = [], False
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        if not isinstance(known.get(key), str):
            known[key], changed = file_sha256(path), True
        digests.append(known[key])
    if changed:
        with contextlib.suppress(OSError):
            write_json(index, known)
    return digests


def cache_root(cache_dir: str | None, first: Path) -> Path:
    """The cache's folder: as configured, else `.lumina-cache` beside the data, else the user's cache folder.

    Beside the data first, because that is where every node of a cluster sees it.
    """
    if cache_dir is not None:
        return Path(cache_dir)
    beside = first.resolve().parent
    if os.access(beside, os.W_OK):
        return beside / ".lumina-cache"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lumina"
