"""Atomic writes: files and folders that appear under their name whole or not at all. And the hash of a file.

Everything that the project keeps is written under another name first, flushed, and then renamed: a kill, a full disk or
a power cut leaves the old contents or the new ones. This imports nothing of the package, so that every room can use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def fsync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_durably(scratch: Path, path: Path) -> None:
    """Give a finished file or folder its name: flushed first, so that the name never stands for half of it. A folder
    that has the name already is removed; of `scratch`, the files directly in it are flushed."""
    if scratch.is_dir():
        for file in scratch.iterdir():
            fsync(file)
        shutil.rmtree(path, ignore_errors=True)
    fsync(scratch)
    os.replace(scratch, path)


def _beside(path: Path, *tokens: str) -> Path:
    """A hidden name in `path`'s folder. Path(".") has no name, and fails where it is renamed, with an OSError."""
    return path.parent / ".".join(("", path.name, *tokens, "partial"))


def _open_to_all(path: Path) -> None:
    """Give a new file the mode that the umask leaves: libraries that write through a temporary file of their own make
    it readable by its owner alone (0600), and another account's server or colleague then cannot read it."""
    own = stat.S_IMODE(path.stat().st_mode)
    if own & 0o077:
        return
    probe = _beside(path, secrets.token_hex(4))
    probe.touch()  # os.umask would change the umask of the other threads for a moment
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    if own | usual != own:
        with suppress(PermissionError):  # a file system without modes
            path.chmod(own | usual)


def _copy_mode(source: Path, target: Path) -> None:
    """The mode of `source`, but that its owner may write."""
    mode = stat.S_IMODE(source.stat().st_mode) | stat.S_IWUSR
    if mode != stat.S_IMODE(target.stat().st_mode):
        with suppress(PermissionError):  # a file system without modes
            target.chmod(mode)


@contextmanager
def atomic_file(path: Path, durable: bool = True, follow: bool = False) -> Iterator[Path]:
    """A name to write `path`'s new contents under, of this process alone; at the end it becomes `path`, unless the
    block raised. durable: flushed before that, so that a power cut leaves the old contents or the new ones too. follow:
    a symbolic link stays and the file that it names is replaced, not the link. A file that was there keeps its mode;
    what is no file, as /dev/stdout or a pipe, is written to in place."""
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    if follow:
        path = path.resolve()
    scratch = _beside(path, secrets.token_hex(4))
    try:
        yield scratch
        if durable:
            fsync(scratch)
        if path.is_file():
            _copy_mode(path, scratch)
        else:
            _open_to_all(scratch)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill, beside `path`; at the end it is flushed and becomes `path`, unless the block raised. One
    process at a time: what an earlier one left is removed. replace: so is a folder that has the name already; otherwise
    it must be empty, or OSError is raised."""
    scratch = _beside(path)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for folder, _, names in os.walk(scratch):
            for name in names:
                _open_to_all(Path(folder, name))
                fsync(Path(folder, name))
            fsync(Path(folder))
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str, durable: bool = True, follow: bool = False) -> None:
    """Write a UTF-8 file as `atomic_file` does. What UTF-8 does not hold, a lone surrogate, becomes a question mark."""
    with atomic_file(path, durable, follow) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="replace")


def write_json(
    path: Path,
    value: Any,
    *,
    indent: int = 1,
    sort_keys: bool = True,
    ensure_ascii: bool = True,
    durable: bool = True,
) -> None:
    """Write a JSON file atomically. Keys sorted by default: equal values give equal bytes."""
    # No newline at the end: then no byte can be missing without the JSON being torn.
    write_text(path, json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii), durable)


def file_sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal, read in blocks."""
    found, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            found.update(block[:size])
    return found.hexdigest()
