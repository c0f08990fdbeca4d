"""The files of a Hugging Face tokenizer's folder: tokenizer.json, its settings, its chat template, and stops.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from lumina import files
from lumina.chat.hf.escaping import clean, is_failure
from lumina.config import UserError
from lumina.files import FormatError, inside, parse_json, read_text, write_text

STOPS = "stops.json"  # the ids that end a turn, as lumina import found them in the model's configuration
DATE = "date.json"  # the date that a template which writes one is given, recorded when the folder was copied
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    STOPS,
    DATE,
)


def read_json(path: Path) -> tuple[str, dict[str, Any]]:
    """A JSON object as text and as values. Raises UserError."""
    try:
        text = read_text(inside(path.parent, path.name))
        values = parse_json(text, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "Give a Hugging Face model's folder.") from None
    except FormatError as error:
        raise UserError(str(error)) from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return text, values


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; both may be missing."""
    paths = (folder / "special_tokens_map.json", folder / "tokenizer_config.json")
    return {name: value for path in paths if path.is_file() for name, value in read_json(path)[1].items()}


def special_names(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their like, which a template may use."""
    names = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[name] = clean(value)
    return names


def template_text(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template, or None. Of several by name, the one called default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_text(inside(folder, path.name))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), None)
    return clean(given) if isinstance(given, str) else None


def find_stops(folder: Path, end_id: int | None) -> frozenset[int]:
    """The ids that end a turn: those of stops.json, else the tokenizer's own end."""
    if (folder / STOPS).is_file():
        return read_stops(folder)
    if end_id is None:
        raise UserError(f"{folder} names no stop token, so an answer would never end", "Import the model again.")
    return frozenset([end_id])


def read_stops(folder: Path) -> frozenset[int]:
    """The ids that end an imported model's turns, from stops.json. Raises UserError."""
    try:
        stops = frozenset(int(token) for token in files.read_json(inside(folder, STOPS))["stop_ids"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{folder / STOPS} cannot be read: {error}", "Import the model again.") from None
    if not stops or min(stops) < 0:
        raise UserError(f"{folder / STOPS} names no stop token", "Import the model again.")
    return stops


def find_date(folder: Path, template: str | None) -> date | None:
    """The date for a template that writes one; None for others.

    It is recorded in date.json. A model's own folder has no such file: there it is the day on which its template was
    written. A folder that has stops.json and no date was imported by version 0.1.0, which gave templates no date; what
    was trained with it goes on without. Raises UserError.
    """
    if template is None or "strftime_now" not in template:
        return None
    if (folder / DATE).is_file():
        try:
            return date.fromisoformat(read_json(folder / DATE)[1]["date"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder / DATE} names no date", 'It holds one like {"date": "2026-01-31"}.') from None
    if (folder / STOPS).is_file():
        return None
    path = folder / "chat_template.jinja"
    written = (path if path.is_file() else folder / "tokenizer_config.json").stat().st_mtime
    return datetime.fromtimestamp(written, UTC).date()


def copy_files(source: Path, target: Path, template: str | None = None) -> None:
    """Copy a tokenizer's files, and nothing else that the folder may hold, into the folder `target`, and record the
    date there for a chat template that writes one. `template`: one in place of the folder's own; its date is today."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            _copy(source, target, name)
    if template is None:
        day = find_date(source, template_text(source, read_settings(source)))
    else:
        write_text(target / "chat_template.jinja", template)
        dated = "strftime_now" in template and not (target / DATE).is_file()
        day = datetime.now(UTC).date() if dated else None
    if day is not None:
        write_text(target / DATE, json.dumps({"date": day.isoformat()}) + "\n")


def _copy(source: Path, target: Path, name: str) -> None:
    try:
        shutil.copyfile(inside(source, name), target / name)
    except OSError as error:
        raise UserError(f"cannot copy {source / name}: {error.strerror}") from None


def with_special_tokens(folder: Path, wanted: Sequence[str]) -> tuple[str, list[str]]:
    """The folder's tokenizer.json with `wanted` as special tokens, and which of them its vocabulary lacked. Reading it
    runs what it holds: call it by bounded_call. Raises UserError."""
    from tokenizers import AddedToken, Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(read_json(path)[0])
        fresh = [token for token in wanted if tokenizer.token_to_id(token) is None]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in wanted])
        ids = tokenizer.get_vocab(with_added_tokens=True)
        text = str(tokenizer.to_str())
    except BaseException as error:
        if not is_failure(error) or isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {error}") from None
    if len(set(ids.values())) < len(ids):
        raise UserError(f"{path} has gaps between its ids, so {', '.join(fresh)} cannot be added")
    return text, fresh
