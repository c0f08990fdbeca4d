"""RoPE scaling in short, counted from the run whose weights another begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lumina.cli import build_parser
from lumina.commands.common import load_config
from lumina.config import RopeScaling, UserError, load


def trained(folder: Path, **settings: Any) -> str:
    """A run's folder with its settings."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(load("nano", settings).values()))
    return str(folder)


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
    config = load_config(build_parser()[0].parse_args(line))
    assert config.seq_length == length
    assert config.rope_scaling == RopeScaling(**expected)
    assert "rope_scaling" in config.explicit
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load(str(again)).rope_scaling == config.rope_scaling
    assert load(str(again), {"resume": "auto", "rope_scaling": text}).rope_scaling == config.rope_scaling


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


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("yarn", "longer than the 512 tokens that the model was trained at, and seq_length is 512"),
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
    with pytest.raises(UserError, match=wrong or "longer than the 512"):
        load("nano", {"init_from": before, "seq_length": 512, "rope_scaling": text})


def test_without_weights_to_count_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is known"):
        load("nano", {"rope_scaling": "yarn:4"})
    assert load("nano", {"rope_scaling": "linear:2"}).rope_scaling == RopeScaling(type="linear", factor=2)
