"""Files: naming what is finished, hashing what is read, and where the cache lives."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import orjson

HASH_BLOCK = 1 << 22


def replace_durably(partial: Path, path: Path) -> None:
    """Gives a finished file its name: flushed to disk first, so that the name never stands for half a file."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: object) -> None:
    """Writes JSON whole or not at all. Keys sorted: equal data gives equal bytes."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(
        orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)
    )
    replace_durably(partial, path)


def sha256_of(path: Path) -> str:
    """The file's SHA-256, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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
            known[key], changed = sha256_of(path), True
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
