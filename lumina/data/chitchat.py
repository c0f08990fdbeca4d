"""The chitchat corpus as training files: `python -m lumina.data.chitchat OUT_DIR`.

PyPI's `chitchat-dataset` (MIT) holds 7,168 dialogues between two people as lists of utterances. Utterances of one
sender in a row become one message; the one who speaks first is the user, the other the assistant. Dialogues with fewer
than two messages are left out. Split by dialogue: every 20th (by a hash of its key) goes to the evaluation file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from lumina.config import UserError, install_command
from lumina.files import atomic_file
from lumina.terminal import say

EVAL_SHARE = 20
TRAIN_FILE, EVAL_FILE = "chitchat.train.jsonl", "chitchat.eval.jsonl"


def merge_turns(messages: list[list[dict[str, Any]]]) -> list[dict[str, str]]:
    """Utterances -> messages of alternating roles. Utterances without text are left out."""
    turns: list[tuple[str, list[str]]] = []
    for utterance in (utterance for turn in messages for utterance in turn):
        text = utterance["text"].strip()
        if not text:
            continue
        if turns and turns[-1][0] == utterance["sender"]:
            turns[-1][1].append(text)
        else:
            turns.append((utterance["sender"], [text]))
    return [
        {"role": "assistant" if i % 2 else "user", "content": "\n".join(texts)} for i, (_, texts) in enumerate(turns)
    ]


def read_dialogues() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Key and messages of every dialogue of two messages or more. Raises UserError: the package is not installed."""
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise UserError("the chitchat corpus is not installed", install_command("quickstart"))
    for key, dialogue in json.loads((Path(spec.origin).parent / "dataset.json").read_bytes()).items():
        messages = merge_turns(dialogue["messages"])
        if len(messages) >= 2:
            yield key, messages


def held_out(key: str) -> bool:
    """Whether the dialogue of that key is for evaluation."""
    return int(hashlib.sha256(key.encode()).digest()[0]) < 256 // EVAL_SHARE


def write_files(out_dir: Path) -> tuple[Path, Path, int, int]:
    """Writes both files. Returns (train path, eval path, train dialogues, eval dialogues).

    Raises:
        UserError: the package is not installed.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / TRAIN_FILE, out_dir / EVAL_FILE]
    counts = [0, 0]
    with (
        atomic_file(paths[0]) as scratch_train,
        atomic_file(paths[1]) as scratch_eval,
        scratch_train.open("wb") as train,
        scratch_eval.open("wb") as evaluation,
    ):
        for key, messages in read_dialogues():
            side = held_out(key)
            (evaluation if side else train).write(orjson.dumps({"id": key, "messages": messages}) + b"\n")
            counts[side] += 1
    return paths[0], paths[1], counts[0], counts[1]


def main() -> int:
    """The command: OUT_DIR, "data" when not given."""
    parser = argparse.ArgumentParser(
        prog="python -m lumina.data.chitchat", description="Write the chitchat corpus as training and evaluation files."
    )
    parser.add_argument("out_dir", nargs="?", type=Path, default=Path("data"), metavar="OUT_DIR", help="data")
    try:
        train, evaluation, train_count, eval_count = write_files(parser.parse_args().out_dir)
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    say(f"{train}: {train_count:,} dialogues\n{evaluation}: {eval_count:,} dialogues")
    return 0


if __name__ == "__main__":
    sys.exit(main())
