"""`lumina inspect --line`: one record, against what preparing the file makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from lumina.cli import main
from lumina.config import UserError
from lumina.data import describe_record, prepare
from tests.data.helpers import TOKENIZER, Settings, chat, write_jsonl
from tests.data.oasst.trees import the_tree

RECORDS: list[Any] = [
    {"id": "first", **chat("hello", "world", "once more", "gladly")},
    b"",
    b"{broken",
    {"question": "what is it", "antwort": "a test"},
    {"messages": [{"role": "nobody", "content": "x"}]},
    [chat("two", "in"), chat("one", "line")],
]


def described(path: Path, line: int, ends: int | None = None, **how: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = describe_record(str(path), line, Settings(**how), TOKENIZER, ends)["records"]
    return found


def test_every_record_is_shown_as_it_is_prepared(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS)
    columns = {"answer": "antwort"}
    dataset = prepare([path], Settings(columns=columns, packing=False), TOKENIZER)
    chunks = [chunk for sample in range(dataset.num_samples) for chunk in dataset.chunks_of(sample)]
    for line in range(1, len(RECORDS) + 1):
        rendered = [
            [(token["id"], token["supervised"]) for token in sample]
            for record in described(path, line, columns=columns)
            for conversation in record["conversations"]
            for sample in conversation["rendered"]
        ]
        own = [
            list(zip(chunk.ids.tolist(), chunk.mask.astype(bool).tolist(), strict=True))
            for chunk in chunks
            if chunk.line == line
        ]
        assert rendered == own
    reasons = {line: described(path, line, columns=columns)[0].get("skipped", {}).get("reason") for line in range(1, 7)}
    assert reasons == {1: None, 2: "blank line", 3: "broken JSON", 4: None, 5: "unknown role", 6: None}
    (first,) = described(path, 1)
    assert first["raw"] == RECORDS[0]
    assert first["format"] == "messages"
    assert first["conversations"][0]["id"] == "first"
    assert [message["supervised"] for message in first["conversations"][0]["messages"]] == [False, True] * 2
    assert [record["raw"] for record in described(path, 6)] == RECORDS[5]


def test_a_tree_and_the_messages_of_one(tmp_path: Path) -> None:
    tree = write_jsonl(tmp_path / "tree.jsonl", [the_tree()])
    (record,) = described(tree, 1)
    assert len(record["conversations"]) == 4
    assert record["paths_discarded"]["deleted"] == 1
    rows = [
        {"message_id": name, "parent_id": parent, "role": role, "text": f"text {name}", "message_tree_id": "t"}
        for name, parent, role in (("a", None, "prompter"), ("b", "a", "assistant"), ("c", None, "prompter"))
    ]
    flat = write_jsonl(tmp_path / "flat.jsonl", rows)
    for line in (1, 2):
        (record,) = described(flat, line)
        assert record["conversations"][0]["messages"][1]["content"] == "text b"
    assert described(flat, 3)[0]["conversations"] == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_jsonl(tmp_path / "in.jsonl", RECORDS))
    assert main(["inspect", path, "--config", "nano", "--line", "1", "--table"]) == 0
    said = capsys.readouterr().out
    assert '"content": "once more"' in said
    assert "<|assistant|>«world<|im_end|>»" in said
    assert "assistant, supervised: world" in said
    assert f"{TOKENIZER.stop_id:>7} supervised" in said
    assert main(["inspect", path, "--config", "nano", "--line", "3"]) == 0
    assert "skipped: broken JSON" in capsys.readouterr().out
    assert main(["inspect", path, "--config", "nano", "--line", "4", "--columns", "answer=antwort", "--json"]) == 0
    answer = orjson.loads(capsys.readouterr().out)
    assert answer["columns"] == {"answer": "antwort"}
    assert answer["records"][0]["conversations"][0]["messages"][1]["content"] == "a test"
    assert main(["inspect", path, "--config", "nano", "--line", "7"]) == 2
    assert "numbered from 1 to 6" in capsys.readouterr().err
    assert main(["inspect", path, path, "--config", "nano", "--line", "1"]) == 2
    assert "of which file" in capsys.readouterr().err


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("word " * 100, "yes")])
    (record,) = described(path, 1, seq_length=32, overlong="drop")
    assert record["conversations"][0]["longer_than_seq_length"] == "drop"
    with pytest.raises(UserError, match="no column"):
        described(path, 1, columns={"prompt": "frage"})


def test_of_a_long_record_beginning_and_end_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Long texts, long lists and long renderings: a terminal gets a bounded part of each and what is left out; all of
    it with --whole, and with --json."""
    long = "very " * 3000 + "long"
    said = [text for n in range(100) for text in (long if n == 1 else f"question {n}", f"and answer {n}")]
    path = write_jsonl(tmp_path / "in.jsonl", [chat(*said)])
    options = ["inspect", str(path), "--line", "1", "--config", "nano", "--chat-template", "im-roles-2"]
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert main([*options, "--whole"]) == 0
    whole = capsys.readouterr().out
    assert main([*options, "--json"]) == 0
    (conversation,) = orjson.loads(capsys.readouterr().out)["records"][0]["conversations"]
    (tokens,), (sample,) = conversation["rendered"], conversation["samples"]
    assert [message["content"] for message in conversation["messages"]] == said
    assert sample == {"tokens": len(tokens), "supervised": sum(t["supervised"] for t in tokens), "left_out": 0}
    assert whole.count(long) == 3  # raw, message, tokens
    assert "left out" not in whole
    assert len(shown) < 33_000 < len(whole)
    for what in (f"{len(long) - 4000:,} characters", "160 messages", f"{len(tokens) - 4000:,} tokens"):
        assert f"── {what} left out (--whole shows them)" in shown
    short = described(path, 1, ends=2000)[0]["conversations"][0]
    assert short["rendered"] == [[*tokens[:2000], *tokens[-2000:]]]
    assert short["samples"] == [{**sample, "left_out": len(tokens) - 4000}]
