"""The reference of the settings is whole, docs/configuration.md is what the command prints, the YAML is read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lumina.cli import main
from lumina.config import Config, load
from lumina.config.reference import SECTIONS, default_of, meanings, type_of

ROOT = Path(__file__).parents[3]


def test_every_setting_has_one_section_and_one_meaning() -> None:
    listed = [name for section in SECTIONS.values() for name in section.model_fields]
    assert sorted(listed) == sorted(Config.model_fields)
    assert meanings().keys() == set(listed)
    assert all(text and "|" not in text for text in meanings().values())


def test_the_document_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "reference"]) == 0
    printed = capsys.readouterr().out
    assert (ROOT / "docs/configuration.md").read_text() == printed, "lumina config reference > docs/configuration.md"
    rows = [line for line in printed.splitlines() if line.startswith("| `")]
    assert len(rows) == len(Config.model_fields)
    assert "| `learning_rate` | number above 0 | `0.0001` | `--lr` | peak learning rate |" in rows
    assert any(row.startswith("| `save_every_n_batches` |") and "`--save-every`" in row for row in rows)


def test_types_and_defaults_are_the_schema_s() -> None:
    assert type_of("gradient_checkpointing") == "true or false or whole number above 0"
    assert type_of("overlong") == "split or truncate or drop"
    assert type_of("warmup_ratio") == "number from 0 to 1"
    assert "cosine" in type_of("lr_scheduler")
    assert (default_of("train_data"), default_of("hidden_size"), default_of("compile")) == ("[]", "", "false")


@pytest.mark.parametrize("preset", ["nano", "medium"])
def test_show_explains_each_setting_and_is_read_back(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", preset, "--set", "sample_prompts=[hello, '# no comment']"]) == 0
    shown = capsys.readouterr().out
    path = tmp_path / "mine.yaml"
    path.write_text(shown)
    again = load(str(path))
    assert again.values() == load(preset, {"sample_prompts": ["hello", "# no comment"]}).values()
    for name in yaml.safe_load(shown):
        assert f"# {meanings()[name]}\n{name}:" in shown


def test_show_without_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show"]) == 2
    assert "lumina config show PRESET" in capsys.readouterr().err
