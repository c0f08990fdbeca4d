"""The data cache: where it lives, and the contents of the files that it is named for: their hashes, kept so that none
is read twice, and whether a file is still what was hashed when it has been read."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from lumina.config import UserError
from lumina.files import file_sha256, write_json

_TICK = 0.02  # seconds: a change so soon after another may leave a file's times as they are
_TRIES = 5


class _Times(NamedTuple):
    """What of a file's entry changes with its contents. changed: also by chmod, chown and links; nobody can set it."""

    size: int
    written: int
    inode: int
    changed: int


class Contents:
    """The contents of some files at one moment: `digests` are their SHA-256, in their order.

    A cache is named for them, so what goes into it must have been read from these very contents: `check` is asked after
    a file was read, and before anything of it is kept.
    """

    def __init__(self, paths: Sequence[Path], index: Path) -> None:
        """Each file is looked up in `index` by path, size and times, so that an unchanged file of any size is not read
        again. A damaged or unwritable index costs time only. Raises UserError where a file does not keep still."""
        known: dict[str, str] = {}
        try:
            loaded = orjson.loads(index.read_bytes())
            if isinstance(loaded, dict):
                known = loaded
        except (OSError, orjson.JSONDecodeError):
            pass
        self.digests: list[str] = []
        self._times: dict[str, _Times] = {}
        self._hashes: dict[str, str] = {}
        found = False
        for path in paths:
            times = _settled(path)
            digest = known.get(_key(path, times))
            if not isinstance(digest, str):
                times, digest = _hashed(path, times)
                known[_key(path, times)], found = digest, True
            self.digests.append(digest)
            self._times[str(path)], self._hashes[str(path)] = times, digest
        if found:
            with contextlib.suppress(OSError):
                write_json(index, known)

    def check(self, path: str | Path) -> None:
        """Raises UserError where a file has changed since its hash was taken."""
        before, now = self._times[str(path)], _times(Path(path))
        if now == before:
            return
        if now[:3] == before[:3]:  # perhaps its mode or owner alone
            now, digest = _hashed(Path(path), now)
            if digest == self._hashes[str(path)]:
                self._times[str(path)] = now
                return
        raise _changed(Path(path))

    def check_all(self) -> None:
        """`check` of every file."""
        for path in self._times:
            self.check(path)


def _times(path: Path) -> _Times:
    found = path.stat()
    return _Times(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)


def _key(path: Path, times: _Times) -> str:
    return "|".join(map(str, (path.resolve(), *times)))


def _settled(path: Path) -> _Times:
    """A file's times, once another change could not leave them as they are."""
    times = _times(path)
    age = time.time() - max(times.written, times.changed) / 1e9
    if abs(age) < _TICK:
        time.sleep(_TICK)
        times = _times(path)
    return times


def _hashed(path: Path, times: _Times) -> tuple[_Times, str]:
    """A file's hash, and the times that it had before and after it was read."""
    for _ in range(_TRIES):
        digest = file_sha256(path)
        now = _settled(path)
        if now == times:
            return times, digest
        times = now
    raise _changed(path)


def _changed(path: Path) -> UserError:
    return UserError(
        f"{path} was changed while it was read, so its contents are neither the old nor the new ones",
        "Start again when nothing writes to it any more.",
    )


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
