"""Text and JSON files: read within bounds as UTF-8, written atomically. And the hash of a file.

Everything that the project keeps is written under another name first, flushed, and then renamed: a kill, a full disk or
a power cut leaves the old contents or the new ones. What is read may have been written by anybody: a pipe in a file's
place, a size without end, other bytes than UTF-8 and JSON nested without end are errors that name the file, and an
encoding never comes from the locale. This imports nothing of the package, so that every room can use it.
"""

from __future__ import annotations

import codecs
import errno
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
LARGEST = 200 * 10**6
"""Bytes that a text or JSON file may have: the tokenizer.json of the largest vocabularies has a tenth of it."""


class FormatError(ValueError):
    """A file whose contents are not what its name promises. The message begins with its path."""


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


def read_bytes(path: str | os.PathLike[str], most: int = LARGEST) -> bytes:
    """A regular file's contents. OSError, with the path and the reason, for anything else: a pipe or a device, which
    could make a reader wait for ever, more than `most` bytes, and a path that no file can have."""
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
        found = file.read(most + 1)
    if len(found) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return found


def read_text(path: str | os.PathLike[str], most: int = LARGEST) -> str:
    """A UTF-8 file's text, without a byte order mark, whatever the locale. OSError as of `read_bytes`, and for other
    bytes than UTF-8."""
    found = read_bytes(path, most).removeprefix(codecs.BOM_UTF8)
    try:
        return found.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{found[error.start]:02x} at offset {error.start:,}"
        raise OSError(errno.EILSEQ, f"it is not UTF-8 text: {byte}", str(path)) from None


def parse_json(text: str, where: str | os.PathLike[str], *, finite: bool = False, **options: Any) -> Any:
    """JSON of `where`. FormatError for what is none, is nested too deeply or has an integer of thousands of digits, and
    with `finite` for NaN, Infinity and 1e999. `options`: further ones of json.loads."""
    where = os.fspath(where)

    def constant(name: str) -> float:
        if finite:
            raise FormatError(f"{where} is not valid JSON: {name} is no number")
        return float(name)

    def number(digits: str) -> float:
        found = float(digits)
        return found if abs(found) < float("inf") else constant(digits)

    try:
        return json.loads(text, **{"parse_constant": constant, "parse_float": number, **options})
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise FormatError(f"{where}, {at}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise FormatError(f"{where} is not valid JSON: it is nested too deeply") from None
    except FormatError:
        raise
    except ValueError:  # int's limit of digits
        raise FormatError(f"{where} is not valid JSON: a number has thousands of digits") from None


def read_json(path: str | os.PathLike[str], *, most: int = LARGEST, finite: bool = False, **options: Any) -> Any:
    """A JSON file's value. OSError as of `read_text`, FormatError as of `parse_json`."""
    return parse_json(read_text(path, most), path, finite=finite, **options)


def read_object(path: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """`read_json` of a file that holds an object; FormatError for another value."""
    found = read_json(path, **options)
    if not isinstance(found, dict):
        raise FormatError(f"{os.fspath(path)} is not a JSON object")
    return found


def real_path(path: Path) -> Path:
    """The path without symbolic links. Links that lead in a circle stay: opening them is an OSError, where
    Path.resolve raises RuntimeError."""
    return Path(os.path.realpath(path))


def inside(folder: Path, name: str) -> Path:
    """The path of the file `name` of a folder that came from elsewhere. OSError where a symbolic link leads out of the
    folder: its contents could be any file of this user's. The hub's cache is a model's folder too: its snapshots/REV
    links to the blobs beside it."""
    path = folder / name
    target, home = real_path(path), real_path(folder)
    homes = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(one) for one in homes):
        raise OSError(errno.ELOOP, f"it leads out of its folder, to {target}", str(path))
    return path


def _name(error: BaseException, scratch: Path, path: Path) -> None:
    """Give an OSError the name that the user knows: that of a full disk has none, others the scratch file's."""
    if not isinstance(error, OSError) or error.errno is None:  # a text of its own, which a name would take the place of
        return
    if error.filename is None or str(scratch) in str(error.filename):
        error.filename, error.filename2 = str(path), None


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
        path = real_path(path)
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
    except BaseException as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        _name(error, scratch, path)
        raise


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill, beside `path`; at the end it is flushed and becomes `path`, unless the block raised. One
    process at a time: what an earlier one left is removed. replace: so is a folder that has the name already; otherwise
    it must be empty, or OSError is raised."""
    scratch = _beside(path)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for folder, _, names in os.walk(scratch):
            for name in names:
                _open_to_all(Path(folder, name))
                fsync(Path(folder, name))
            fsync(Path(folder))
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        os.replace(scratch, path)
    except OSError as error:
        _name(error, scratch, path)
        raise
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
