"""Input paths: patterns, folders that `datasets` saved, and the refusal of a path that is neither."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lumina.config import UserError


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
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            which = " or ".join(str(folder / split) for split in splits)
            raise UserError(f"{folder} holds the splits {', '.join(splits)}", f"Name one: {which}.")
        if (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [str(folder / file["filename"]) for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError, OSError):
        return []  # what it is instead, check_inputs says
    return []


def check_inputs(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    files = [Path(path) for path in expand([os.fspath(path) for path in paths])]
    if not files:
        raise UserError("no data files given")
    for path in files:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise UserError(f"data file {path} {what}")
        if path.stat().st_size == 0:
            raise UserError(f"data file {path} is empty", "It should hold one conversation a line.")
        if not os.access(path, os.R_OK):
            raise UserError(f"data file {path} may not be read by this user")
    return files
