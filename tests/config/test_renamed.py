"""Settings under the names of an earlier version: every one is read, and one line names the new one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from lumina.config import RopeScaling, UserError, load
from lumina.config.loading import inherited
from lumina.config.renamed import RENAMED

LLAMA_3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# As version 0.1.0 wrote it; the setting's name now; what it must be now.
OLD: list[tuple[str, Any, str, Any]] = [
    ("answer_spike", "skip", "on_spike", "skip"),
    ("answer_spike", "warn", "on_spike", "warn"),
    ("answer_out_of_memory", True, "on_oom", "halve_micro_batch"),
    ("answer_out_of_memory", False, "on_oom", "fail"),
    ("answer_corrupt_sample", True, "on_corrupt_sample", "zero_weight"),
    ("answer_corrupt_sample", False, "on_corrupt_sample", "fail"),
    ("health_off", ["plateau", "gpu-ecc"], "disabled_rules", ["plateau", "gpu-ecc"]),
]


def test_every_renamed_setting_is_tried() -> None:
    assert {old for old, *_ in OLD} | {"rope_scaling.original_window"} == set(RENAMED)


@pytest.mark.parametrize(("old", "given", "new", "expected"), OLD)
def test_a_yaml_file_and_set_take_the_old_name(
    old: str, given: Any, new: str, expected: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump({"preset": "nano", old: given}))
    for config in (load(str(path)), load("nano", sets=[f"{old}={yaml.safe_dump(given, default_flow_style=True)}"])):
        assert getattr(config, new) == expected
        assert new in config.explicit
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all(f"{old} is {new} now" in line for line in said)
    assert said[0].startswith(str(path))


def test_a_key_within_a_setting_is_renamed_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"preset": "nano", "rope_scaling": {**LLAMA_3, "original_window": 512}}))
    scaling = load(str(path)).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 512
    assert "rope_scaling.original_window is rope_scaling.original_max_position_embeddings now" in caplog.text
    assert inherited(str(tmp_path), 64)["rope_scaling"] == {**LLAMA_3, "original_max_position_embeddings": 512}


def test_an_old_runs_configuration_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The config.yaml of a run holds every setting."""
    path = tmp_path / "config.yaml"
    settings = load("nano").values()
    for old, given, new, _ in OLD:
        settings.pop(new, None)
        settings[old] = given
    del settings["rule_settings"]  # there were none
    path.write_text(yaml.safe_dump(settings))
    with caplog.at_level(logging.WARNING):
        config = load(str(path))
    assert (config.on_spike, config.on_oom, config.on_corrupt_sample) == ("warn", "fail", "fail")
    assert len(caplog.records) == 1


def test_both_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("answer_spike: skip\non_spike: warn\n")
    with pytest.raises(UserError, match="`answer_spike` is the old name of `on_spike`, and both are given"):
        load(str(path))


def test_a_value_that_was_never_right_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("answer_out_of_memory: perhaps\n")
    with pytest.raises(UserError, match=r"`answer_out_of_memory` \(given 'perhaps'\) was true or false\n  Set on_oom"):
        load(str(path))
    path.write_text("health_off: [platau]\n")
    with pytest.raises(UserError, match=r"wrong.yaml, line 1: `disabled_rules` .*no such health rule: platau"):
        load(str(path))


def test_the_card_of_an_export_of_0_1_0_builds_its_model() -> None:
    """Such a card calls ModelConfig with the keys of lumina.json, past the table."""
    values = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old, new = (
        RopeScaling(**values, **{name: 8192}) for name in ("original_window", "original_max_position_embeddings")
    )
    assert old == new
    assert old.original_max_position_embeddings == 8192
    assert "original_window" not in old.model_dump()
