"""Input paths: patterns, folders that `datasets` saved, streams, and the refusal of a path that is none of them."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lumina.config import UserError
from lumina.files import read_json


def expand(paths: Sequence[str]) -> list[str]:
    """Patterns -> the files they match, sorted; a path without wildcards, or that exists, stays as it is. A folder that
    `datasets` saved is its Arrow files."""
    found: list[str] = []
    for path in paths:
        matches = [] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
        for match in matches or [path]:
            found += _saved_dataset(Path(match)) or [match]
    return found


def _saved_dataset(folder: Path) -> list[str]:
    """The files of `Dataset.save_to_disk(folder)`, none when it is none. UserError for one of several splits."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = read_json(folder / "dataset_dict.json")["splits"]
            which = " or ".join(str(folder / split) for split in splits)
            raise UserError(f"{folder} holds the splits {', '.join(splits)}", f"Name one: {which}.")
        if (folder / "state.json").is_file():
            state = read_json(folder / "state.json")
            return [str(folder / file["filename"]) for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError, OSError):
        return []  # what it is instead, check_inputs says
    return []


def check_inputs(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths name. A stream (a named pipe, `<(…)`, /dev/stdin) is read to its end first, and is from then
    on the file that it was written to: data is read more than once. UserError for what is no file."""
    given = [os.fspath(path) for path in paths]
    try:
        files = [Path(path) for path in expand(given)]
        if not files:
            raise UserError("no data files given")
        return [_checked(path) for path in files]
    except OSError as error:
        raise UserError(f"data file {error.filename or ', '.join(given)}: {error.strerror}") from None
    except ValueError as error:  # a NUL
        raise UserError(f"data file {', '.join(given)!r}: {error}") from None


def _checked(given: Path) -> Path:
    path = _spooled(given) if is_stream(given) else given
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise UserError(f"data file {path} {what}")
    if path.stat().st_size == 0:
        raise UserError(f"data file {given} is empty", "It should hold one conversation a line.")
    if not os.access(path, os.R_OK):
        raise UserError(f"data file {path} may not be read by this user")
    return path


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a pipe: what it holds can be read once."""
    return Path(path).is_fifo()


_spool: tempfile.TemporaryDirectory[str] | None = None  # of this process, removed at its end
_spooled_as: dict[tuple[str, int], Path] = {}


def _spooled(path: Path) -> Path:
    """The file that a stream's contents are kept in while this process lives."""
    global _spool
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"data file {path} is a pipe, which several processes cannot read", "Write it to a file first.")
    key = (str(path), path.stat().st_ino)
    if key not in _spooled_as:
        if _spool is None:
            _spool = tempfile.TemporaryDirectory(prefix="lumina-streams-")
        target = Path(_spool.name) / f"{len(_spooled_as)}-{path.name}"
        with path.open("rb") as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        _spooled_as[key] = target
    return _spooled_as[key]
