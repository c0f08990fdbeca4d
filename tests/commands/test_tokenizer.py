"""`lumina train-tokenizer`: conversations of any format to a tokenizer's folder."""

import json
from pathlib import Path

import pytest

from lumina import cli
from lumina.chat import open_tokenizer


def write(path: Path) -> Path:
    records = [
        {
            "messages": [
                {"role": "user", "content": "zebras zebras"},
                {"role": "assistant", "content": "zebras are odd"},
            ]
        },
        {"prompt": "quaggas quaggas quaggas", "response": "quaggas are gone"},
        {"nothing": 1},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_format_teaches_and_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tokenizer"
    line = ["train-tokenizer", str(write(tmp_path / "a.jsonl")), "--out", str(out), "--vocab-size", "300"]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "left out: 1 records" in said
    assert f"--set tokenizer={out} --set vocab_size={open_tokenizer(out).vocab_size}" in said
    tokenizer = open_tokenizer(out)
    assert [len(tokenizer.encode(word)) for word in (" zebras", " quaggas")] == [1, 1]
    assert cli.main(line) == 2
    assert "already holds something" in capsys.readouterr().err


def test_a_template_that_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = str(write(tmp_path / "a.jsonl")), tmp_path / "tokenizer"
    assert cli.main(["train-tokenizer", data, "--out", str(out), "--chat-template", "chatlm"]) == 2
    assert "Did you mean `chatml`?" in capsys.readouterr().err
    assert not out.exists()
