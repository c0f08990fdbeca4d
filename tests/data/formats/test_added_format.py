"""A data format of another package: found by entry point, from a record in a file to a sample, in every process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lumina.config import UserError, registry
from lumina.data import formats, prepare, prepare_splits, validate
from lumina.data.formats import convert, format_of
from lumina.data.preparing import pool, preparation
from tests.data.helpers import (
    TOKENIZER,
    Settings,
    Source,
    chat,
    config_of,
    expected_targets,
    supervised_targets,
    write_jsonl,
)

DIALOGUE = """
from lumina.chat import Message
from lumina.data.formats import DataFormat, Vocabulary, has, to_conversation

RECORD = Vocabulary("a dialogue", frozenset({"asked", "said"}))


def from_dialogue(record, tally):
    if record["said"] == "bug":
        raise KeyError("said")
    messages = [Message("user", record["asked"]), Message("assistant", record["said"])]
    return to_conversation(record, messages, tally, RECORD)


FORMAT = DataFormat("dialogue", from_dialogue, recognise=((15, has("asked")),), required=has("asked"))
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a package with one entry point on the path, as pip would leave it."""
    folder = tmp_path / "site"

    def clear() -> None:
        registry.forget()
        formats.named.cache_clear()
        formats.tests_by_precedence.cache_clear()

    def put(source: str = DIALOGUE, version: str = "1.0") -> None:
        info = folder / "dialogue_data-1.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (folder / "dialogue_data.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dialogue-data\nVersion: {version}\n")
        (info / "entry_points.txt").write_text("[lumina.formats]\ndialogue = dialogue_data:FORMAT\n")
        monkeypatch.syspath_prepend(folder)
        sys.modules.pop("dialogue_data", None)
        clear()

    yield put
    sys.modules.pop("dialogue_data", None)
    clear()


def acts(count: int) -> list[dict[str, Any]]:
    return [{"asked": f"question {i}", "said": f"answer number {i}"} for i in range(count)]


def test_a_record_becomes_a_sample_here_and_in_worker_processes(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = acts(40)
    path = write_jsonl(tmp_path / "in.jsonl", [*records, chat("q", "a")])
    assert prepare([path], Settings(), TOKENIZER).account["conversations"] == 1, "it is not installed yet"
    install()
    same = [chat(record["asked"], record["said"]) for record in records]
    monkeypatch.setattr(preparation, "MIN_TASK_BYTES", 300)
    monkeypatch.setattr(preparation, "MAX_TASK_BYTES", 300)
    made = []
    for workers, enough in ((1, 1 << 30), (2, 1)):
        monkeypatch.setattr(pool, "BYTES_PER_WORKER", enough)
        dataset = prepare([path], Settings(cache_dir=str(tmp_path / f"cache{workers}")), TOKENIZER, workers=workers)
        assert dataset.account["conversations"] == 41
        assert dataset.account["fields"]["used"]["asked"] == 40
        assert supervised_targets(dataset) == expected_targets([*same, chat("q", "a")])
        made.append(dataset.fingerprint)
    assert made[0] == made[1]
    assert validate([str(path)], TOKENIZER).statistics.formats == {"dialogue": 40, "messages": 1}


def test_precedence_decides_between_two_formats_that_a_record_fits(install: Install) -> None:
    record = {**acts(1)[0], "messages": chat("q", "a")["messages"]}
    install()
    assert format_of(record) == "messages"  # 10, before 15
    install(DIALOGUE.replace("(15,", "(5,"))
    assert format_of(record) == "dialogue"


def test_a_source_may_name_it(install: Install, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [*acts(3), chat("q", "a")])
    with pytest.raises(UserError, match="no such data format: dialogue"):
        config_of(data=[{"path": str(path), "format": "dialogue"}])
    install()
    assert config_of(data=[{"path": str(path), "format": "dialogue"}]).data[0].format == "dialogue"
    with pytest.raises(UserError, match=r"no such data format: dialoge\. Did you mean dialogue\?"):
        config_of(data=[{"path": str(path), "format": "dialoge"}])
    train, _ = prepare_splits(Settings(data=(Source(str(path), format="dialogue"),)), TOKENIZER)
    assert train.account["conversations"] == 3
    assert train.account["faults"]["another format than the one given"]["lines"] == 1


def test_another_version_of_it_prepares_anew_and_without_it_nothing_changes(install: Install, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("q", "a"), chat("question", "answer")])
    before = prepare([path], Settings(), TOKENIZER).fingerprint
    install()
    one = prepare([path], Settings(), TOKENIZER).fingerprint
    install(version="1.1")
    two = prepare([path], Settings(), TOKENIZER).fingerprint
    assert len({before, one, two}) == 3


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_that_name", "does not load: ModuleNotFoundError"),
        ("FORMAT = 7", "is no DataFormat, but int"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_before_any_work(
    install: Install, tmp_path: Path, source: str, said: str
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("q", "a")])
    install(source)
    with pytest.raises(UserError, match=said):
        prepare([path], Settings(), TOKENIZER)


@pytest.mark.parametrize("enough", [1 << 30, 1])
def test_what_it_raises_ends_the_command_with_its_name(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: int
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [*acts(30), {"asked": "x", "said": "bug"}])
    monkeypatch.setattr(preparation, "MIN_TASK_BYTES", 300)
    monkeypatch.setattr(preparation, "MAX_TASK_BYTES", 300)
    monkeypatch.setattr(pool, "BYTES_PER_WORKER", enough)
    install()
    with pytest.raises(UserError, match=r"the data format dialogue failed on record .*: KeyError"):
        prepare([path], Settings(), TOKENIZER, workers=2)


def test_our_own_formats_are_those_that_a_source_may_name() -> None:
    assert registry.FORMATS.names() == ["alpaca", "messages", "oasst", "prompt", "question", "sharegpt", "text"]
    assert convert({"question": "q", "answer": "a", "text": "set aside"}, "question").messages[1].content == "a"


def test_the_documents_name_every_format() -> None:
    documented = Path(__file__).parents[3].joinpath("docs/data.md").read_text()
    for name in registry.FORMATS.own():
        assert f"| `{name}` |" in documented
