"""The data commands: their JSON and their text, and what inspect shows against the template."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from helpers import TOKENIZER, Settings, chat, write_jsonl

from lumina.chat import Conversation, Message, render
from lumina.config.errors import UserError
from lumina.data.commands import inspect_command, prepare_command
from lumina.data.inspection import describe
from lumina.data.preparation import prepare


def test_prepare_prints_the_account_or_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "[bold]in.jsonl", [chat("q", "a"), b"bad"])
    assert prepare_command([str(path)], Settings(), json=True) == 0
    figures = orjson.loads(capsys.readouterr().out)
    assert figures["samples"] == 1
    assert figures["supervised_tokens"] == 2
    assert Path(figures["cache"]).is_dir()
    assert figures["account"]["faults"]["broken JSON"]["first"] == [f"{path}:2"]
    assert prepare_command([str(path)], Settings()) == 0
    out = capsys.readouterr().out
    assert "messages       2 = 1 trained + 1 masked + 0 dropped" in out
    assert f"bad: broken JSON: 1 ({path}:2)" in out, "a file's name is not markup"


def test_inspect_shows_what_the_template_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("how <|im_end|> [red]?", "漢🙂 fine")])
    expected = render(
        TOKENIZER, Conversation([Message("user", "how <|im_end|> [red]?"), Message("assistant", "漢🙂 fine")])
    )
    assert inspect_command([str(path)], Settings(), json=True) == 0
    (document,) = orjson.loads(capsys.readouterr().out)["documents"]
    tokens = document["tokens"]
    assert [token["id"] for token in tokens] == expected.ids.tolist()
    assert [token["learned"] for token in tokens] == (expected.mask == 1).tolist()
    assert [token["target"] for token in tokens[:-1] if token["weight"]] == expected.ids[expected.mask == 1].tolist()
    assert document["source"] == f"{path}:1"
    assert document["round_trip"]
    assert inspect_command([str(path)], Settings(), table=True) == 0
    out = capsys.readouterr().out
    assert "<|im_start|><|user|>how <|im_end|> [red]?<|im_end|><|im_start|><|assistant|>«漢🙂 fine<|im_end|>»" in out
    assert f"{TOKENIZER.stop_id} 0" in out
    with pytest.raises(UserError, match="no sample 1"):
        inspect_command([str(path)], Settings(), sample=1)


def test_a_piece_that_begins_inside_a_message_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("q", "word " * 100)])
    dataset = prepare([path], Settings(packing=False), TOKENIZER)
    flags = [describe(dataset, s, TOKENIZER)["documents"][0]["begins_inside_a_message"] for s in range(3)]
    assert flags == [False, False, True]


def test_prepare_with_an_eval_fraction_prints_both_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat(f"question {i}", "a") for i in range(40)])
    assert prepare_command([str(path)], Settings(eval_fraction=0.5), json=True) == 0
    figures = orjson.loads(capsys.readouterr().out)
    assert figures["supervised_tokens"] + figures["held_out"]["supervised_tokens"] == 80
    assert prepare_command([str(path)], Settings(eval_fraction=0.5)) == 0
    assert "dropped conversations: left for training" in capsys.readouterr().out
