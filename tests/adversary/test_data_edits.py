"""Data that is edited while it is prepared: no cache may be named for contents that it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lumina.config import UserError
from lumina.data import prepare, prepare_pairs, prepare_splits
from tests.data.helpers import TOKENIZER, Settings, chat, write_jsonl

OLD = [chat("Which animal?", f"A cat, number {number}.") for number in range(30)]
NEW = [chat("Which animal?", f"A dog, number {number}.") for number in range(30)]
OLD_PAIRS = [{"prompt": "Which animal?", "chosen": "A cat.", "rejected": f"No {number}."} for number in range(30)]
NEW_PAIRS = [{"prompt": "Which animal?", "chosen": "A dog.", "rejected": f"No {number}."} for number in range(30)]


class Meddling:
    """The tokenizer, while whose first rendering somebody saves the file anew."""

    def __init__(self, edit: Callable[[], object]) -> None:
        self._edit: Callable[[], object] | None = edit

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)

    def render_valid(self, *given: Any, **named: Any) -> Any:
        if self._edit is not None:
            self._edit()
            self._edit = None
        return TOKENIZER.render_valid(*given, **named)


def texts(dataset: Any) -> str:
    return "".join(TOKENIZER.decode(dataset.batch([sample]).ids_T.tolist()) for sample in range(dataset.num_samples))


def plain(path: Path, tokenizer: Any, edit: Callable[[], object]) -> Any:
    return prepare([path], Settings(), tokenizer)


def split(path: Path, tokenizer: Any, edit: Callable[[], object]) -> Any:
    return prepare_splits(Settings(train_data=(str(path),), dedup="exact"), tokenizer)[0]


def split_while_deciding(path: Path, tokenizer: Any, edit: Callable[[], object]) -> Any:
    """The edit comes while the split is decided, before anything is rendered."""
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        if not seen and tokenizer is not TOKENIZER:
            edit()
        seen.append(done)

    return prepare_splits(Settings(train_data=(str(path),), dedup="exact"), TOKENIZER, progress=progress)[0]


def pairs(path: Path, tokenizer: Any, edit: Callable[[], object]) -> Any:
    return prepare_pairs([path], Settings(seq_length=64), tokenizer)


DOORS = {"plain": plain, "split": split, "split while deciding": split_while_deciding, "pairs": pairs}


@pytest.mark.parametrize("door", DOORS)
def test_no_cache_holds_other_contents_than_its_name_says(door: str, tmp_path: Path) -> None:
    old, new = (OLD_PAIRS, NEW_PAIRS) if door == "pairs" else (OLD, NEW)
    path = write_jsonl(tmp_path / "data.jsonl", old)
    edit = lambda: write_jsonl(path, new)  # of the same size
    with pytest.raises(UserError, match=r"data\.jsonl was changed while it was read"):
        DOORS[door](path, Meddling(edit), edit)
    assert not list((tmp_path / ".lumina-cache").glob("*/meta.json"))
    for contents, animal, other in ((new, "dog", "cat"), (old, "cat", "dog"), (new, "dog", "cat")):
        write_jsonl(path, contents)
        found = texts(DOORS[door](path, TOKENIZER, edit))
        assert f"A {animal}" in found
        assert other not in found
