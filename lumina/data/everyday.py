"""Short everyday exchanges as training files: `python -m lumina.data.everyday OUT_DIR`.

Two sources, both from PyPI and both written by people for others to train on:

- `chatterbot-corpus` (BSD), its English files on everyday things: exchanges.jsonl. A list there is a dialogue in some
  files, and in the others a question and its answers, an exchange each. The same exchange is taken once.
- `chitchat-dataset` (MIT), how each dialogue opens, its first four messages: openings.train.jsonl and
  openings.eval.jsonl, split by dialogue as lumina/data/chitchat.py does.

No text of these is changed but for white space in the first. A model that has seen each question in one form only
answers no other form of it, so that a fourth file, varied.jsonl, has every exchange many times over, with the user's
words varied by chance: words left out, swapped and put in (easy data augmentation, arXiv:1901.11196), pieces of other
messages before and behind, another case, another mark at the end. The answers stay as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import yaml

from lumina.config import UserError, install_command
from lumina.data import chitchat
from lumina.files import atomic_file
from lumina.terminal import say

EXCHANGES, VARIED = "exchanges.jsonl", "varied.jsonl"
OPENINGS_TRAIN, OPENINGS_EVAL = "openings.train.jsonl", "openings.eval.jsonl"
OPENING = 4  # messages
VARIANTS = 110  # of each exchange
SEED = 7
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

_NOT = re.compile(r"\b(\w+)n['’]t\b", re.IGNORECASE)
_BEFORE_NOT = {"wo": "will", "ca": "can", "sha": "shall"}


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


def varied(text: str, chance: random.Random, messages: Sequence[Sequence[str]]) -> str:
    """The text with words left out, swapped and put in by `chance`, and "won't" and its like in full half of the time;
    a fifth of the time as it is. messages: the words of each message from which pieces are taken. Something of the text
    is always left."""
    if chance.random() < 0.2:
        return text
    if chance.random() < 0.5:
        text = _NOT.sub(lambda found: f"{_BEFORE_NOT.get(found[1].lower(), found[1])} not", text)
    words, kept = text.split(), []
    for word in words:
        if len(words) > 2 and chance.random() < 0.12:
            continue
        kept += [*(_piece(chance, messages, 1) if chance.random() < 0.1 else []), word]
    kept = kept or words
    if len(kept) > 2 and chance.random() < 0.15:
        at = chance.randrange(len(kept) - 1)
        kept[at : at + 2] = kept[at + 1], kept[at]
    before = _piece(chance, messages, 5) if chance.random() < 0.4 else []
    behind = _piece(chance, messages, 5) if chance.random() < 0.4 else []
    text = " ".join([*before, *kept, *behind])
    case = chance.random()
    text = text.lower() if case < 0.2 else text[:1].upper() + text[1:] if case < 0.4 else text
    mark = chance.random()
    return text if mark < 0.5 else text.rstrip("?.!") + (chance.choice("?.!") if mark < 0.8 else "")


def _piece(chance: random.Random, messages: Sequence[Sequence[str]], most: int) -> Sequence[str]:
    """One to `most` words that follow one another in a message."""
    words, count = chance.choice(messages), chance.randint(1, most)
    at = chance.randrange(max(1, len(words) - count + 1))
    return words[at : at + count]


def vary_exchanges(exchanges: list[Messages], openings: list[Messages]) -> list[Messages]:
    """Each exchange `VARIANTS` times with the user's words varied, by pieces of users' questions and of openings."""
    chance = random.Random(SEED)
    pieces = [message["content"].split() for messages in openings for message in messages]
    pieces += [messages[0]["content"].split() for messages in exchanges]
    return [
        [
            {**message, "content": varied(message["content"], chance, pieces)} if message["role"] == "user" else message
            for message in messages
        ]
        for messages in exchanges
        for _ in range(VARIANTS)
    ]


def write_files(out_dir: Path) -> dict[Path, int]:
    """Writes the four files; returns how many conversations each has. Raises UserError: a package is missing."""
    files: dict[str, list[Messages]] = {EXCHANGES: read_exchanges(), OPENINGS_TRAIN: [], OPENINGS_EVAL: []}
    for key, messages in chitchat.read_dialogues():
        files[OPENINGS_EVAL if chitchat.held_out(key) else OPENINGS_TRAIN].append(messages[:OPENING])
    files[VARIED] = vary_exchanges(files[EXCHANGES], files[OPENINGS_TRAIN])
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
        say(f"error: {error}", file=sys.stderr)
        return 2
    say("\n".join(f"{path}: {count:,} conversations" for path, count in written.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
