"""Short everyday exchanges as training files: `python -m lumina.data.everyday OUT_DIR`.

Two sources, both from PyPI and both written by people for others to train on:

- `chatterbot-corpus` (BSD), its English files on everyday things: exchanges.jsonl. A list there is a dialogue in some
  files, and in the others a question and its answers, an exchange each. The same exchange is taken once.
- `chitchat-dataset` (MIT), how each dialogue opens, its first four messages: openings.train.jsonl and
  openings.eval.jsonl, split by dialogue as lumina/data/chitchat.py does.

Nothing is added, and no text is changed but for white space in the first.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import yaml

from lumina.config import UserError, install_command
from lumina.data import chitchat
from lumina.files import atomic_file

EXCHANGES, OPENINGS_TRAIN, OPENINGS_EVAL = "exchanges.jsonl", "openings.train.jsonl", "openings.eval.jsonl"
OPENING = 4  # messages
FILES = {
    "ai": False,
    "botprofile": False,
    "conversations": True,
    "food": False,
    "greetings": False,
    "health": True,
    "humor": False,
    "tech_support": False,
}
"""The corpus's files that are taken, and whether a list there is a dialogue. The others are opinions, facts, code, or
many answers to one reproach: more than a model of this size learns in minutes."""

Messages = list[dict[str, str]]


def exchanges_of(name: str, lists: list[list[Any]]) -> Iterator[Messages]:
    """The lists of the corpus's file `name` -> conversations of two messages or more."""
    for lines in lists:
        texts = [text for text in (" ".join(str(line).split()) for line in lines) if text]
        if len(texts) < 2:
            continue
        for said in [texts] if FILES[name] else [[texts[0], answer] for answer in texts[1:]]:
            yield [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]


def read_exchanges() -> list[Messages]:
    """Every exchange of the corpus once, in its order. Raises UserError: the package is not installed."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        raise UserError("the chatterbot corpus is not installed", install_command("quickstart"))
    found: dict[tuple[str, ...], Messages] = {}
    for name in FILES:
        file = Path(spec.origin).parent / "data" / "english" / f"{name}.yml"
        lists = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["conversations"]
        for messages in exchanges_of(name, lists):
            found.setdefault(tuple(message["content"] for message in messages), messages)
    return list(found.values())


def write_files(out_dir: Path) -> dict[Path, int]:
    """Writes the three files; returns how many conversations each has. Raises UserError: a package is missing."""
    files: dict[str, list[Messages]] = {EXCHANGES: read_exchanges(), OPENINGS_TRAIN: [], OPENINGS_EVAL: []}
    for key, messages in chitchat.read_dialogues():
        files[OPENINGS_EVAL if chitchat.held_out(key) else OPENINGS_TRAIN].append(messages[:OPENING])
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, conversations in files.items():
        with atomic_file(out_dir / name) as scratch:
            scratch.write_bytes(b"".join(orjson.dumps({"messages": messages}) + b"\n" for messages in conversations))
    return {out_dir / name: len(conversations) for name, conversations in files.items()}


def main() -> int:
    """The command: OUT_DIR, "data" when not given."""
    parser = argparse.ArgumentParser(
        prog="python -m lumina.data.everyday", description="Write short everyday exchanges as training files."
    )
    parser.add_argument("out_dir", nargs="?", type=Path, default=Path("data"), metavar="OUT_DIR", help="data")
    out_dir = parser.parse_args().out_dir
    try:
        written = write_files(out_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{path}: {count:,} conversations" for path, count in written.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
