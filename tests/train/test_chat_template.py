"""Which template a run is trained with, and by which every later use of it goes: 0.2.0's runs record none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from lumina.chat import TEMPLATES, Tokenizer
from lumina.config import Config, UserError, load
from lumina.config.schema import FIRST_TEMPLATE
from lumina.config.schema import ChatTemplate as Known
from lumina.data import prepare
from lumina.infer import export, import_hf
from lumina.infer import load as load_model
from lumina.train.chat_template import say_taught, with_template
from tests.earlier_versions import as_of_0_2
from tests.infer.small_models import make_model, write_run

SMALL = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, model = tmp_path_factory.mktemp("runs"), make_model(**SMALL)
    return {"old": as_of_0_2(write_run(place / "old", model)), "new": write_run(place / "new", model)}


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def settings(**changes: object) -> Config:
    return load("nano", {**SMALL, **changes})


def test_the_schema_names_the_templates() -> None:
    assert Known.__args__ == tuple(TEMPLATES)  # type: ignore[attr-defined]
    assert next(iter(TEMPLATES)) == FIRST_TEMPLATE


@pytest.mark.parametrize(("which", "name"), [("old", "im-roles-1"), ("new", "im-roles-2")])
def test_a_run_is_gone_on_with_as_it_was_taught(runs: dict[str, Path], which: str, name: str) -> None:
    checkpoint = newest(runs[which])
    assert with_template(settings(), checkpoint, None).chat_template == name
    assert with_template(settings(chat_template=name), checkpoint, None).chat_template == name
    other = next(one for one in TEMPLATES if one != name)
    with pytest.raises(UserError, match=f"trained with the chat template {name}, not {other}"):
        with_template(settings(chat_template=other), checkpoint, None)


def test_a_new_run_has_the_newest_or_what_its_weights_were_taught(
    runs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert with_template(settings(), None, None).chat_template == "im-roles-2"
    assert with_template(settings(chat_template="im-roles-1"), None, None).chat_template == "im-roles-1"
    assert with_template(settings(), None, newest(runs["old"])).chat_template == "im-roles-1"
    assert settings(init_from=str(runs["old"])).chat_template == "im-roles-1"
    assert settings(init_from=str(runs["new"])).chat_template == settings().chat_template
    say_taught(newest(runs["old"]), settings(init_from=str(runs["old"])))
    say_taught(newest(runs["old"]), settings(init_from=str(runs["old"]), chat_template="im-roles-2"))
    say_taught(newest(runs["new"]), settings(chat_template="im-roles-2"))
    kept, changed = caplog.messages
    assert "chat template im-roles-1" in kept
    assert "was taught the chat template im-roles-1; this run is trained with im-roles-2" in changed


def test_its_configuration_means_the_same_template(runs: dict[str, Path], tmp_path: Path) -> None:
    """Prepared anew with the run's own config.yaml, data is what it was trained on; a user's own file is a new run."""
    assert load(str(runs["old"] / "config.yaml")).chat_template == "im-roles-1"
    own = tmp_path / "config.yaml"
    own.write_text((runs["old"] / "config.yaml").read_text())
    assert load(str(own)).chat_template is None
    with pytest.raises(UserError, match="im-roles-3"):
        load("nano", {"chat_template": "im-roles-3"})
    with pytest.raises(UserError, match="the tokenizer brings another"):
        load("nano", {"chat_template": "im-roles-1", "tokenizer": "somewhere"})


@pytest.mark.parametrize(("which", "name"), [("old", "im-roles-1"), ("new", "im-roles-2")])
def test_it_is_asked_and_exported_with_its_own(runs: dict[str, Path], which: str, name: str, tmp_path: Path) -> None:
    loaded = load_model(runs[which], "fp32")
    assert (loaded.tokenizer.chat_template, loaded.tokenizer.template_version) == (name, name)
    assert loaded.tokenizer.fingerprint == Tokenizer.load(name).fingerprint
    folder = export(runs[which], tmp_path / "hf").folder
    described = json.loads((folder / "tokenizer_config.json").read_text())
    assert described["lumina_fingerprint"] == Tokenizer.load(name).fingerprint
    assert ("<|tool_call|>" in described["chat_template"]) == (name == "im-roles-2")
    assert f"| Chat template | {name} |" in (folder / "README.md").read_text()
    back = load_model(import_hf(folder, tmp_path / "back"), "fp32")
    assert back.tokenizer.chat_template == name
    assert load(str(tmp_path / "back/config.yaml")).chat_template == name


def test_workers_of_prepare_have_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, and the old template: the ids would be the same, so tools are what tells them apart."""
    monkeypatch.setattr("lumina.data.preparing.pool.BYTES_PER_WORKER", 1)
    record = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "reasoning_content": "because"},
        ]
    }
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text(json.dumps(record) + "\n" + '{"messages": [{"role": "assistant", "content": "b"}]}\n')
    for name, dropped in (("im-roles-1", 2), ("im-roles-2", 0)):
        config = settings(cache_dir=str(tmp_path / "cache"), num_workers=2)
        account = prepare(paths, config, Tokenizer.load(name)).account
        assert sum(account["conversations_dropped"].values()) == dropped
        assert account["conversations"] == 4
