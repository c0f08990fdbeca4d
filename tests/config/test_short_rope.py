"""RoPE scaling in short, counted from the run whose weights another begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lumina.cli import build_parser
from lumina.commands.common import load_config
from lumina.config import Config, RopeScaling, UserError, load


def trained(folder: Path, **settings: Any) -> str:
    """A run's folder with its settings."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(load("nano", settings).values()))
    return str(folder)


def parsed(line: list[str]) -> Config:
    return load_config(build_parser()[0].parse_args(line))


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("yarn", 8192, {"type": "yarn", "factor": 4, "original_max_position_embeddings": 2048}),
        ("yarn:6", 8192, {"type": "yarn", "factor": 6, "original_max_position_embeddings": 2048}),
        ("linear", 3072, {"type": "linear", "factor": 1.5}),
        (
            "llama3:8",
            1024,
            {
                "type": "llama3", "factor": 8, "original_max_position_embeddings": 2048,
                "low_freq_factor": 1, "high_freq_factor": 4,
            },
        ),
    ],
)  # fmt: skip
def test_a_longer_context_over_another_runs_weights(
    text: str, length: int, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Its own length counts, not the one that a new run would take over."""
    before = trained(tmp_path / "base", seq_length=2048)
    line = ["train", "--config", "nano", "--init-from", before, "--seq-length", str(length), "--rope-scaling", text]
    config = parsed(line)
    assert config.seq_length == length
    assert config.rope_scaling == RopeScaling(**expected)
    assert "rope_scaling" in config.explicit
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load(str(again)).rope_scaling == config.rope_scaling
    assert load(str(again), {"resume": "auto", "rope_scaling": text}).rope_scaling == config.rope_scaling

    # The run is resumed by the command that began it, and by its YAML file, which need not say what it began with.
    place = {"output_dir": str(tmp_path), "experiment_name": "longer"}
    line += ["--resume", "auto", "--output-dir", str(tmp_path), "--experiment-name", "longer"]
    assert parsed(line).rope_scaling == config.rope_scaling, "which begins with --resume auto"
    (tmp_path / "longer/checkpoints/step-00000004").mkdir(parents=True)
    (tmp_path / "longer/config.yaml").write_text(config.replace(**place).to_yaml("init_from"))
    assert parsed(line).rope_scaling == config.rope_scaling
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"preset: nano\nseq_length: {length}\nrope_scaling: {text}\n")
    for given in ({"resume": "auto", **place}, {"resume": str(tmp_path / "longer")}, {"init_from": before}):
        assert load(str(mine), given).rope_scaling == config.rope_scaling, given
    other = load(str(mine), {"resume": "auto", "rope_scaling": expected["type"] + ":7", **place}).rope_scaling
    assert other == RopeScaling(**expected | {"factor": 7}), "which the run then refuses"
    assert load(str(mine), {"resume": "auto", "rope_scaling": "none", **place}).rope_scaling is None


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_weights_of_a_scaled_run_count_from_where_that_began(kind: str, tmp_path: Path) -> None:
    first = trained(tmp_path / "first", seq_length=512)
    second = load("nano", {"init_from": first, "seq_length": 1024, "rope_scaling": kind})
    before = trained(tmp_path / "second", seq_length=1024, rope_scaling=second.rope_scaling)
    third = load("nano", {"init_from": before, "seq_length": 4096, "rope_scaling": kind}).rope_scaling
    assert third is not None
    assert third.factor == 8
    assert load("nano", {"init_from": before, "rope_scaling": "none"}).rope_scaling is None
    other = "yarn" if kind == "linear" else "linear"
    with pytest.raises(UserError, match=f"scaled by {kind} already"):
        load("nano", {"init_from": before, "seq_length": 4096, "rope_scaling": other})


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_the_longest_context_of_the_weights_counts(kind: str, tmp_path: Path) -> None:
    """Fine-tuned twice at a preset's shorter context, they are scaled as they would be at once; scaled once, and
    fine-tuned again, their scaling goes on from there."""
    first = trained(tmp_path / "first", seq_length=32768)
    longer = {"seq_length": 65536, "rope_scaling": kind}
    direct = load("nano", {"init_from": first, **longer}).rope_scaling
    before = first
    for name in ("second", "third"):
        config = load("nano", {"init_from": before})
        assert (config.seq_length, config.trained_seq_length) == (512, 32768)
        before = trained(tmp_path / name, **config.values() | {"init_from": None})
        scaled = load("nano", {"init_from": before, **longer})
        assert scaled.rope_scaling == direct, name
        assert scaled.rope_scaling is not None
        assert scaled.rope_scaling.factor == 2
    mid = trained(tmp_path / "scaled", **scaled.values() | {"init_from": None})
    again = load("nano", {"init_from": mid})
    assert (again.seq_length, again.trained_seq_length, again.rope_scaling) == (512, 65536, direct)
    last = trained(tmp_path / "last", **again.values() | {"init_from": None})
    with pytest.raises(UserError, match="own 65536 tokens"):
        load("nano", {"init_from": last, **longer})
    more = load("nano", {"init_from": last, **longer, "seq_length": 262144}).rope_scaling
    assert more is not None
    assert more.factor == 8


def test_runs_of_earlier_versions_say_what_they_began_with_in_run_json(tmp_path: Path) -> None:
    """Their config.yaml has no trained_seq_length. One that is said to have begun with itself ends the search."""
    began: str | None = None
    for name, length in (("first", 2048), ("second", 512), ("third", 256)):
        folder = tmp_path / name
        folder.mkdir()
        kept = {k: v for k, v in load("nano", {"seq_length": length}).values().items() if k != "trained_seq_length"}
        (folder / "config.yaml").write_text(yaml.safe_dump(kept))
        (folder / "run.json").write_text(json.dumps({"config": {"init_from": began}}))
        began = str(folder)
    scaled = load("nano", {"init_from": began, "seq_length": 8192, "rope_scaling": "yarn"})
    assert scaled.rope_scaling == RopeScaling(type="yarn", factor=4, original_max_position_embeddings=2048)
    assert scaled.trained_seq_length == 2048
    (tmp_path / "first/run.json").write_text(json.dumps({"config": {"init_from": str(tmp_path / "first")}}))
    assert load("nano", {"init_from": began}).trained_seq_length == 2048
    for broken in ("", "[]", '{"config": 3}', '{"config": {"init_from": 3}}'):
        (tmp_path / "third/run.json").write_text(broken)
        assert load("nano", {"init_from": began}).trained_seq_length == 256, broken


def test_what_an_earlier_run_began_with_is_looked_for_where_lengths_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a resume, and nowhere but in that very run: gone, damaged or out of reach, its length is not known."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("preset: nano\nseq_length: 65536\n")
    run, base = tmp_path / "runs/run", tmp_path / "runs/base"
    (run / "checkpoints/step-00000003").mkdir(parents=True)
    (run / "config.yaml").write_text(load("nano").to_yaml("init_from", "trained_seq_length"))
    for began in ("runs/base", "runs/base/checkpoints/step-00000001"):
        (run / "run.json").write_text(json.dumps({"config": {"init_from": began}}))
        for given, flags in (
            ("runs/run/config.yaml", {"resume": "runs/run"}),
            ("nano", {"resume": "auto", "output_dir": "runs", "experiment_name": "run"}),
            ("nano", {"init_from": "runs/run"}),
        ):
            begins = "init_from" in flags
            assert load(given, flags).trained_seq_length == (512 if begins else None), "it is gone"
            base.mkdir()
            for text, length in (("lr: [", 512), ("\udcff", 512), ("preset: nano\nseq_length: 2048\n", 2048)):
                (base / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
                assert load(given, flags).trained_seq_length == (length if begins else None), text
            (base / "config.yaml").unlink()
            base.rmdir()
    base.mkdir()
    (base / "config.yaml").write_text("preset: nano\nseq_length: 2048\n")
    (run / "config.yaml").write_text(load("runs/run/config.yaml", {"resume": "runs/run"}).to_yaml("init_from"))
    assert load("nano", {"init_from": "runs/run"}).trained_seq_length == 2048, "also of a run that was resumed since"


def test_a_users_file_says_what_weights_were_trained_at(tmp_path: Path) -> None:
    mine, base = tmp_path / "mine.yaml", trained(tmp_path / "base", seq_length=256)
    mine.write_text("preset: nano\ntrained_seq_length: 8192\n")
    for flags in ({}, {"init_from": base}, {"resume": "auto", "output_dir": str(tmp_path)}):
        assert load(str(mine), flags).trained_seq_length == 8192, flags


def test_a_copy_of_a_runs_settings_says_nothing_of_other_weights(tmp_path: Path) -> None:
    """trained_seq_length stands in config.yaml, which another run may be started by."""
    first = trained(tmp_path / "first", seq_length=4096)
    run = Path(trained(tmp_path / "run", **load("nano", {"init_from": first}).values() | {"init_from": None}))
    assert load(str(run / "config.yaml"), {"resume": "auto"}).trained_seq_length == 4096
    assert load(str(run / "config.yaml")).trained_seq_length is None
    kept = load(str(run / "config.yaml"), {"resume": "auto"}).to_yaml("init_from")
    (run / "config.yaml").write_text(kept)  # without `resume`, as a run writes it
    assert load(str(run / "config.yaml")).trained_seq_length is None
    other = trained(tmp_path / "other", seq_length=128)
    assert load(str(run / "config.yaml"), {"init_from": other}).trained_seq_length == 128
    assert load("nano", {"init_from": other, "trained_seq_length": 256}).trained_seq_length == 256, "as the user says"


def test_the_weights_scaling_goes_on_as_it_is_but_for_the_factor(tmp_path: Path) -> None:
    yarn = {
        "type": "yarn", "factor": 4, "original_max_position_embeddings": 512, "beta_fast": 64, "beta_slow": 2,
        "truncate": False, "attention_factor": 1.25,
    }  # fmt: skip
    given = {"init_from": trained(tmp_path / "base", seq_length=2048, rope_scaling=yarn), "seq_length": 4096}
    longer = load("nano", {**given, "rope_scaling": "yarn"}).rope_scaling
    assert longer == RopeScaling(**yarn | {"factor": 8, "attention_factor": None}), "the latter goes by the factor"
    assert load("nano", {**given, "rope_scaling": "yarn:4"}).rope_scaling == RopeScaling(**yarn)
    (tmp_path / "base/config.yaml").write_text("seq_length: 2048\nrope_scaling: {type: yarn, factor: four}\n")
    with pytest.raises(UserError, match="rope_scaling of the weights' run: `factor`"):
        load("nano", {**given, "rope_scaling": "yarn"})


@pytest.mark.parametrize(("length", "own"), [(131072, 131072), (8192, 65536)])
def test_llama_3_1_reads_more_than_its_original_length(length: int, own: int, tmp_path: Path) -> None:
    """Its 131,072 tokens are 16 times its original length by a factor of 8; in a run at a shorter context, 8 times."""
    scaling = {
        "type": "llama3", "factor": 8, "original_max_position_embeddings": 8192, "low_freq_factor": 1,
        "high_freq_factor": 5,
    }  # fmt: skip
    before = trained(tmp_path / "base", seq_length=length, rope_scaling=scaling)
    with pytest.raises(UserError, match=f"own {own} tokens, and seq_length is {own}: nothing gets longer"):
        load("nano", {"init_from": before, "seq_length": own, "rope_scaling": "llama3"})
    longer = load("nano", {"init_from": before, "seq_length": 2 * own, "rope_scaling": "llama3"}).rope_scaling
    assert longer == RopeScaling(**scaling | {"factor": 16})


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("yarn", "longer than the model's own 512 tokens, and seq_length is 512: nothing gets longer"),
        ("yarn:0.5", "FACTOR from 1"),
        ("yarn:inf", "FACTOR from 1"),
        ("yarn:", None),
        ("rope", "is not TYPE or TYPE:FACTOR"),
        ("dynamic:2", "is not TYPE or TYPE:FACTOR"),
        ("linear:two", "is not TYPE or TYPE:FACTOR"),
    ],
)
def test_what_is_refused(text: str, wrong: str | None, tmp_path: Path) -> None:
    before = trained(tmp_path / "base", seq_length=512)
    with pytest.raises(UserError, match=wrong or "the model's own 512"):
        load("nano", {"init_from": before, "seq_length": 512, "rope_scaling": text})


def test_without_weights_to_count_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is known"):
        load("nano", {"rope_scaling": "yarn:4"})
    assert load("nano", {"rope_scaling": "linear:2"}).rope_scaling == RopeScaling(type="linear", factor=2)
