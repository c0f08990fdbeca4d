"""The table of what may change on a resume: a verdict for every setting, and what is kept out of config.yaml."""

import logging
import re
from pathlib import Path

import pytest
import yaml

from lumina.config import ON_RESUME, Config, OnResume, differences, load


def test_every_setting_has_a_verdict() -> None:
    """A new setting gets one in lumina/config/resuming.py: what becomes of a run that is resumed with another value?"""
    assert set(ON_RESUME) == set(Config.model_fields)


@pytest.mark.parametrize(
    ("setting", "verdict"),
    [
        ("seed", OnResume.REFUSED),
        ("objective", OnResume.REFUSED),
        ("train_data", OnResume.DATA),
        ("seq_length", OnResume.DATA),
        ("tokenizer", OnResume.DATA),
        ("epochs", OnResume.SCHEDULE),
        ("max_steps", OnResume.SCHEDULE),
        ("global_batch_size", OnResume.CHECKPOINT),
        ("learning_rate", OnResume.SHOWN),
        ("batch_size", OnResume.FREE),
        ("num_workers", OnResume.FREE),
    ],
)
def test_what_the_laws_hang_on(setting: str, verdict: OnResume) -> None:
    assert ON_RESUME[setting] is verdict


def test_the_document_has_the_table() -> None:
    """Every refusable setting stands in the row of its verdict; the other rows name some."""
    text = (Path(__file__).parents[2] / "docs/resuming.md").read_text()
    for verdict in OnResume:
        row = text.split(f"<!-- {verdict.name.lower()} -->")[1].split("|")[0]
        named = set(re.findall(r"`(\w+)`", row))
        settings = {name for name, own in ON_RESUME.items() if own is verdict}
        assert named <= settings, verdict
        if verdict not in (OnResume.SHOWN, OnResume.FREE):
            assert named == settings, verdict


def test_differences_are_those_of_the_verdicts_and_known_before() -> None:
    before = {"seed": 1, "learning_rate": 1e-4, "num_workers": 2}
    now = {"seed": 2, "learning_rate": 2e-4, "num_workers": 3, "objective": "sft"}
    assert [str(one) for one in differences(before, now, OnResume.REFUSED)] == ["seed 2, was 1"]
    assert [one.name for one in differences(before, now, OnResume.REFUSED, OnResume.SHOWN)] == ["seed", "learning_rate"]


def copied(tmp_path: Path, **more: str) -> Path:
    """A config.yaml as a run of 0.2.0 left it when it had been resumed."""
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump({**load("nano").values(), "train_data": ["a"], **more}, sort_keys=False))
    return path


def test_a_copied_configuration_does_not_go_on_with_the_other_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied(tmp_path, resume="auto", init_from="elsewhere")
    config = load(str(path))
    assert (config.resume, config.init_from) == (None, None)
    assert not {"resume", "init_from"} & config.explicit
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.partition("`")[2].partition("`")[0] for line in lines] == ["resume: auto", "init_from: elsewhere"]
    assert lines[0].endswith("if you mean it: --resume auto")
    assert lines[1].endswith("if you mean it: --init-from elsewhere")
    caplog.clear()
    assert load(str(path), {"resume": "auto"}).resume == "auto"
    assert caplog.text == "", "a start that resumes need not be told"


def test_a_file_written_by_hand_may_name_what_it_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: nano\ninit_from: elsewhere\n")
    assert load(str(path)).init_from == "elsewhere"


def test_what_belongs_to_one_start_is_not_written() -> None:
    config = load("nano", {"resume": "auto", "init_from": "elsewhere"})
    assert "resume" not in yaml.safe_load(config.to_yaml())
    assert "init_from" not in yaml.safe_load(config.to_yaml("init_from"))
