"""Column mapping: a file of other names trains the same, the mapping is part of what it is, wrong names are refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.cli import main
from lumina.commands.data import validate_files
from lumina.config import UserError, load
from lumina.data import estimate, prepare, prepare_pairs, prepare_splits
from lumina.data.account import Account
from lumina.data.converting.columns import renamed
from lumina.data.records.fields import FieldTally
from tests.data.helpers import TOKENIZER, Settings, Source, chat, config_of, supervised_targets, write_jsonl

ASKED = [{"prompt": f"question {i}", "response": f"answer {i}", "system": "be brief"} for i in range(40)]
THEIRS = [{"frage": r["prompt"], "antwort": r["response"], "rolle": r["system"], "nr": i} for i, r in enumerate(ASKED)]
COLUMNS = {"prompt": "frage", "response": "antwort", "system": "rolle"}


@pytest.mark.parametrize("how", [{}, {"eval_fraction": 0.3}, {"dedup": "exact"}])
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_mapped_columns_train_as_the_formats_own(tmp_path: Path, how: dict[str, Any], form: str) -> None:
    ours = write_jsonl(tmp_path / "ours.jsonl", ASKED)
    theirs = tmp_path / f"theirs.{form}"
    if form == "csv":
        with theirs.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(THEIRS[0]))
            writer.writeheader()
            writer.writerows(THEIRS)
    else:
        write_jsonl(theirs, THEIRS)
    expected = prepare_splits(Settings(train_data=(str(ours),), **how), TOKENIZER)
    ways = [
        Settings(train_data=(str(theirs),), columns=COLUMNS, **how),
        Settings(data=(Source(str(theirs), columns=COLUMNS),), **how),
        # A source's own mapping comes before the one of all.
        Settings(data=(Source(str(theirs), columns=COLUMNS),), columns={"prompt": "nr"}, **how),
    ]
    for config in ways:
        found = prepare_splits(config, TOKENIZER)
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert supervised_targets(one) == supervised_targets(other)
                Account.from_dict(one.account).check()
        assert f"note: columns of {theirs}: prompt from `frage`, response from `antwort`" in str(
            found[0].account_lines()
        )
        used = found[0].account["fields"]["used"]
        assert used["prompt"] == used["response"] == used["system"] == len(ASKED)
        assert found[0].account["fields"]["unknown"] == {"nr": len(ASKED)}


def test_the_mapping_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    record = {"a": "one text", "b": "another text", "c": "a third text"}
    path = str(write_jsonl(tmp_path / "in.jsonl", [record] * 3))
    mappings = [{"prompt": x, "response": y} for x, y in (("a", "b"), ("b", "a"), ("a", "c"))]
    for how in ({}, {"dedup": "exact"}):
        prints = {
            prepare_splits(Settings(train_data=(path,), columns=columns, **how), TOKENIZER)[0].fingerprint
            for columns in mappings
        }
        assert len(prints) == len(mappings)
    pairs = str(write_jsonl(tmp_path / "pairs.jsonl", [{"q": "hm", "good": "yes", "bad": "no"}] * 3))
    named = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    found = prepare_pairs([pairs], Settings(columns=named), TOKENIZER)
    assert found.num_samples == 3
    assert "columns: prompt from `q`, chosen from `good`, rejected from `bad`" in found.account_lines()
    other = prepare_pairs([pairs], Settings(columns={**named, "chosen": "bad", "rejected": "good"}), TOKENIZER)
    assert other.fingerprint != found.fingerprint


def test_a_file_without_a_mapping_keeps_its_fingerprint(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "in.jsonl", [chat("a", "b")]))
    plain = prepare_splits(Settings(train_data=(path,)), TOKENIZER)[0].fingerprint
    assert prepare_splits(Settings(data=(Source(path, columns={}),)), TOKENIZER)[0].fingerprint == plain


def test_what_stands_under_the_formats_name_is_set_aside_and_counted(tmp_path: Path) -> None:
    records = [
        {"prompt": "q", "response": "bad", "better": "good"},
        {"prompt": "q", "response": "only"},
        {"prompt": "swap", "response": "back"},
    ]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    dataset = prepare([path], Settings(columns={"response": "better"}), TOKENIZER)
    said = TOKENIZER.decode(dataset.batch(range(dataset.num_samples)).ids_T.tolist())
    assert "good<|im_end|>" in said
    assert "only<|im_end|>" in said
    assert "bad" not in said
    assert dataset.account["fields"]["set aside"] == {"response": 1}
    swapped = prepare([path], Settings(columns={"response": "prompt", "prompt": "response"}), TOKENIZER)
    said = TOKENIZER.decode(swapped.batch(range(swapped.num_samples)).ids_T.tolist())
    assert "<|user|>back<|im_end|><|im_start|><|assistant|>swap<|im_end|>" in said


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "frage"}, r"no data format has a field `promt`. Did you mean `prompt`\?"),
        ({"prompt": "farge"}, r"has no column `farge` in its first records. Did you mean `frage`\?\n.*frage, antwort"),
        ({"prompt": "nothing like it"}, r"has no column `nothing like it`"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_read(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    path = str(write_jsonl(tmp_path / "in.jsonl", THEIRS))
    for run in (
        lambda: prepare([path], Settings(columns=columns), TOKENIZER),
        lambda: prepare_splits(Settings(train_data=(path,), dedup="exact", columns=columns), TOKENIZER),
        lambda: prepare_pairs([path], Settings(columns=columns), TOKENIZER),
        lambda: estimate([path], config_of(columns=columns), TOKENIZER),
        lambda: validate_files(path, columns=columns),
    ):
        with pytest.raises(UserError, match=message):
            run()


def test_one_of_several_files_may_have_the_formats_own_names(tmp_path: Path) -> None:
    ours, theirs = write_jsonl(tmp_path / "ours.jsonl", ASKED), write_jsonl(tmp_path / "theirs.jsonl", THEIRS)
    dataset = prepare([ours, theirs], Settings(columns=COLUMNS), TOKENIZER)
    assert dataset.account["conversations"] == 80
    assert dataset.account["bad_lines"] == 0


def test_the_commands_take_a_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_jsonl(tmp_path / "in.jsonl", THEIRS))
    mapping = ["--columns", "prompt=frage,response=antwort,system=rolle"]
    assert main(["prepare", path, "--config", "nano", *mapping]) == 0
    assert "40 used + 0 bad" in capsys.readouterr().out
    fixed = tmp_path / "fixed.jsonl"
    assert main(["validate-data", path, *mapping, "--fix", str(fixed)]) == 0
    said = capsys.readouterr().out
    assert "40 used + 0 bad" in said
    assert "columns of" in said
    config = Settings(train_data=(str(fixed),))
    expected = Settings(train_data=(path,), columns=COLUMNS)
    assert supervised_targets(prepare_splits(config, TOKENIZER)[0]) == supervised_targets(
        prepare_splits(expected, TOKENIZER)[0]
    )
    assert main(["prepare", path, "--config", "nano", "--columns", "prompt"]) == 2
    assert "FIELD=COLUMN" in capsys.readouterr().err


def test_mappings_of_the_configuration(tmp_path: Path) -> None:
    assert load("nano", {"columns": "prompt=q, response=a"}).columns == {"prompt": "q", "response": "a"}
    file = tmp_path / "c.yaml"
    file.write_text("preset: nano\ncolumns: {prompt: q}\ndata: [{path: a, columns: {response: b}}]\n")
    config = load(str(file))
    assert config.columns == {"prompt": "q"}
    assert config.data[0].columns == {"response": "b"}
    for wrong in ("prompt", "prompt=a=b", "prompt=a,prompt=b", "prompt=a,response=a", "=a", "prompt="):
        with pytest.raises(UserError, match="column"):
            load("nano", {"columns": wrong})


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(), max_size=6),
    st.lists(st.tuples(st.sampled_from("abcdxyz"), st.sampled_from("abcdef")), max_size=4),
)
def test_no_value_is_lost_or_doubled(record: dict[str, int], pairs: list[tuple[str, str]]) -> None:
    columns: dict[str, str] = {}
    for name, column in pairs:
        if name not in columns and column not in columns.values():
            columns[name] = column
    tally = FieldTally()
    out = renamed(record, columns, tally)
    for name, column in columns.items():
        if column in record:
            assert out[name] == record[column]
    moved = {column for column in columns.values() if column in record}
    aside = tally.totals().get("set aside", {})
    assert len(out) + sum(aside.values()) == len(record)
    for name in record.keys() - moved:
        assert (out.get(name) == record[name]) or name in aside
