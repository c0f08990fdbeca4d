"""The data commands: their JSON and their text, and what inspect shows against the template."""

from __future__ import annotations

import gzip
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumina.chat import Conversation, Message, render
from lumina.cli import main
from lumina.commands.data import inspect_sample, prepare_files
from lumina.config import UserError
from lumina.data.preparing.preparation import prepare
from lumina.data.reports.inspection import describe_sample, render_sample
from tests.data.helpers import TOKENIZER, Settings, chat, config_of, write_jsonl


def test_prepare_prints_the_account_or_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "[bold]in.jsonl", [chat("q", "a"), b"bad"])
    assert prepare_files([str(path)], config_of(), json=True) == 0
    figures = orjson.loads(capsys.readouterr().out)
    assert figures["samples"] == 1
    assert figures["supervised_tokens"] == 2
    assert Path(figures["cache"]).is_dir()
    assert figures["account"]["faults"]["broken JSON"]["first"] == [f"{path}:2"]
    assert prepare_files([str(path)], config_of()) == 0
    out = capsys.readouterr().out
    assert "messages       2 = 1 supervised + 1 masked + 0 dropped" in out
    assert f"bad: broken JSON: 1 ({path}:2)" in out, "a file's name is not markup"


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.json", "in.parquet"])
def test_a_dry_run_foretells_what_preparing_comes_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Of 12 MB a third is read. It says what preparing then finds, within 3%, and writes nothing."""
    records = [chat(f"question {i}", f"answer {i}: " + "some words " * (i % 90)) for i in range(24_000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        lines = b"\n".join(map(orjson.dumps, records))
        path.write_bytes({"gz": gzip.compress(lines, 1), "on": orjson.dumps(records)}.get(name[-2:], lines))
    config = config_of(seq_length=512)
    assert prepare_files([str(path)], config, dry_run=True, json=True) == 0
    said = orjson.loads(capsys.readouterr().out)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert said["sampled"] < 0.6
    dataset = prepare([path], config, TOKENIZER)
    held = sum(file.stat().st_size for file in dataset.folder.iterdir())
    assert said["lines"] == pytest.approx(dataset.account["lines"], rel=0.03)
    assert said["tokens"] == pytest.approx(dataset.account["tokens"], rel=0.03)
    assert said["supervised_tokens"] == pytest.approx(dataset.num_supervised, rel=0.03)
    assert said["samples"] == pytest.approx(dataset.num_samples, rel=0.03)
    assert said["disk_bytes"] == pytest.approx(held, rel=0.15)
    assert said["seconds"] > 0


def test_a_dry_run_of_a_small_file_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("q", "a"), b"bad"])
    assert prepare_files([str(path)], config_of(), dry_run=True) == 0
    out = capsys.readouterr().out
    assert "lines          2, 1 of them bad" in out
    assert "conversations  1\n" in out
    assert "nothing was written" in out


def test_a_dry_run_says_that_a_share_cannot_be_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the words in which preparing refuses; a share that can be held out is no warning."""
    path = write_jsonl(tmp_path / "in.jsonl", [{"id": "corpus", **chat(f"q {i}", f"a {i}")} for i in range(50)])
    config = config_of(eval_fraction=0.1)
    assert prepare_files([str(path)], config, dry_run=True) == 0
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: "))
    with pytest.raises(UserError) as refused:
        prepare_files([str(path)], config)
    assert warning == f"warning: {refused.value.message}. {refused.value.remedy}"
    write_jsonl(path, [{"id": i, **chat(f"q {i}", f"a {i}")} for i in range(200)])
    assert prepare_files([str(path)], config, dry_run=True) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_dry_run_warns_of_answers_without_their_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    """As preparing itself does: 2 of 102 answers, after a question of several chunks."""
    records = [chat(f"why {i}", f"so {i}") for i in range(100)] + [chat("word " * 200, "answer " * 200)] * 2
    path = write_jsonl(tmp_path / "in.jsonl", records)
    config = config_of(seq_length=64, overlong_context=share)
    assert prepare_files([str(path)], config, dry_run=True) == 0
    foretold = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    dataset = prepare([path], config, TOKENIZER)
    found = [line.strip() for line in dataset.account_lines() if "warning" in line]
    assert [" ".join(line.split()) for line in foretold] == found
    assert len(found) == (share == 0)
    if found:
        assert found[0].startswith("warning: 2 of 102 answers begin without their question")


def test_inspect_shows_what_the_template_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("how <|im_end|> [red]?", "漢🙂 fine")])
    expected = render(
        TOKENIZER, Conversation([Message("user", "how <|im_end|> [red]?"), Message("assistant", "漢🙂 fine")])
    )
    assert inspect_sample([str(path)], config_of(), json=True) == 0
    (document,) = orjson.loads(capsys.readouterr().out)["documents"]
    tokens = document["tokens"]
    assert [token["id"] for token in tokens] == expected.ids.tolist()
    assert [token["supervised"] for token in tokens] == (expected.mask == 1).tolist()
    assert [token["target"] for token in tokens[:-1] if token["weight"]] == expected.ids[expected.mask == 1].tolist()
    assert document["source"] == f"{path}:1"
    assert document["round_trip"]
    assert inspect_sample([str(path)], config_of(), table=True) == 0
    out = capsys.readouterr().out
    assert "<|im_start|><|user|>how <|im_end|> [red]?<|im_end|><|im_start|><|assistant|>«漢🙂 fine<|im_end|>»" in out
    assert f"{TOKENIZER.stop_id} 0" in out
    with pytest.raises(UserError, match="no sample 1"):
        inspect_sample([str(path)], config_of(), sample=1)


def test_a_chunk_that_begins_with_earlier_tokens_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat("q", "word " * 100)])
    dataset = prepare([path], Settings(packing=False), TOKENIZER)
    described = [describe_sample(dataset, sample, TOKENIZER) for sample in range(2)]
    assert [one["documents"][0]["context_tokens"] for one in described] == [0, 5]  # the question, and a token before
    assert "begins with 5 token(s)" in render_sample(described[1], TOKENIZER, table=False)[1].plain


def test_prepare_with_an_eval_fraction_prints_both_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [chat(f"question {i}", "a") for i in range(40)])
    assert prepare_files([str(path)], config_of(eval_fraction=0.5), json=True) == 0
    figures = orjson.loads(capsys.readouterr().out)
    assert figures["supervised_tokens"] + figures["held_out"]["supervised_tokens"] == 80
    assert prepare_files([str(path)], config_of(eval_fraction=0.5)) == 0
    assert "dropped conversations: left for training" in capsys.readouterr().out


def test_a_table_with_columns_of_no_meaning_is_told_what_to_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("A,B,C\nhow are you,very well,x\n")
    assert main(["validate-data", str(path)]) == 1
    assert "(A, B, C); say what stands where: --columns prompt=ITS_NAME,response=ITS_NAME" in capsys.readouterr().out
    assert main(["validate-data", str(path), "--columns", "prompt=A,response=B"]) == 0
    assert "1 conversations" in capsys.readouterr().out


def test_of_a_long_sample_beginning_and_end_are_shown(tmp_path: Path) -> None:
    """Every token is shown or counted: in the document that is cut, and in those of the middle."""
    path = write_jsonl(tmp_path / "in.jsonl", [chat(f"question {n}", " ".join(["word"] * 30)) for n in range(20)])
    dataset = prepare([path], Settings(seq_length=4096), TOKENIZER)
    whole, ends = describe_sample(dataset, 0, TOKENIZER), describe_sample(dataset, 0, TOKENIZER, ends=50)
    every = [token for document in whole["documents"] for token in document["tokens"]]
    shown = [token for document in ends["documents"] for token in document["tokens"]]
    assert shown == every[:50] + every[-50:]
    assert sum(document["left_out"] for document in ends["documents"]) == len(every) - 100
    cut = [document for document in ends["documents"] if document["tokens"] and document["left_out"]]
    assert [document["head"] for document in cut] == [len(cut[0]["tokens"]), 0]
    middle = [document for document in ends["documents"] if not document["tokens"]]
    lines = [line.plain for line in render_sample(ends, TOKENIZER, table=False)]
    assert f"── {len(middle):,} documents left out, {sum(one['left_out'] for one in middle):,} tokens" in lines
    assert sum("tokens left out (--whole" in line for line in lines) == len(cut) == 2
    assert describe_sample(dataset, 0, TOKENIZER, ends=len(every)) == whole
