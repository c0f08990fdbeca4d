"""Training that begins with an imported model, in its own tokenizer and template: real runs, resumed, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import yaml

import tests.runs as real
from lumina.chat import open_tokenizer
from lumina.cli import main
from lumina.config import UserError
from lumina.config import load as load_config
from lumina.data import prepare_splits
from lumina.infer import export, import_hf, load
from lumina.train.initialise import weights_of
from tests.infer.hf_models import make_hf
from tests.runs import Runs, final, losses, write_conversations
from tests.small_tokenizer import CHATML, small_vocabulary, write_tokenizer

# A run may be made longer under this schedule: no step that was taken would have had another learning rate.
CONSTANT = {"lr_scheduler": "constant", "warmup_ratio": 0}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3: norms of heads, heads that do not fill the width, ChatML."""
    folder = tmp_path_factory.mktemp("imported")
    make_hf(folder / "hf", "qwen3")
    return import_hf(folder / "hf", folder / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "train.jsonl", 40, seed=5)


def argv(run: Path, data: Path, *words: str, stage: int = 0, **settings: Any) -> list[str]:
    line = ["--config", "nano", "--train-data", str(data), "--output-dir", str(run.parent)]
    line += ["--experiment-name", run.name, "--ds_config", str(real.ROOT / "ds_configs" / f"zero{stage}.json"), *words]
    settings = {"num_workers": 1, "epochs": 100, "learning_rate": 3e-3, "precision": "fp32", **settings}
    return line + [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def test_twenty_steps_resume_answer_export(runs: Runs, place: Path, imported: Path, data: Path) -> None:
    run, begin = place / "tuned", ("--init-from", str(imported))
    more = {"max_steps": 20, "batch_size": 4, "sample_prompts": ["hello"], "eval_fraction": 0.2, **CONSTANT}
    runs.train(argv(run, data, *begin, **more))
    curve = losses(run)
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["family"], settings["head_size"], settings["tokenizer"]) == ("qwen3", 20, "tokenizer")

    moved = place / "moved" / "tuned"  # what it needs is in its folder
    moved.parent.mkdir()
    run.rename(moved)
    settings |= {"output_dir": str(moved.parent), "max_steps": 24}
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    hidden = imported.with_name("hidden")
    imported.rename(hidden)
    try:
        runs.train(["--resume", str(moved), "--experiment-name", moved.name, "--output-dir", str(moved.parent)])
    finally:
        hidden.rename(imported)
    assert len(losses(moved)) == 24

    loaded = load(moved, precision="fp32")
    assert loaded.step == 24
    export(moved, place / "hf")
    written = json.loads((place / "hf/config.json").read_text())
    assert (written["model_type"], written["head_dim"]) == ("qwen3", 20)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(place / "hf").eval()
    chat = [{"role": "user", "content": "hello there"}]
    inputs = AutoTokenizer.from_pretrained(place / "hf").apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"]
    with torch.no_grad():
        own = loaded.model(ids, torch.arange(ids.shape[1])[None])
        torch.testing.assert_close(theirs(ids).logits, own, rtol=1e-5, atol=1e-5)


def test_every_stage_and_world_trains_the_same_weights(runs: Runs, place: Path, imported: Path, data: Path) -> None:
    """Biases and norms of heads under ZeRO: partitioned, saved, and put together again elsewhere."""
    begin, settings = (
        ("--init-from", str(imported)),
        {"global_batch_size": 4, "max_steps": 3, "batch_size": 1, **CONSTANT},
    )
    worlds = {"alone": (0, 1), "two": (2, 2), "three": (3, 2)}
    for name, (stage, world) in worlds.items():
        runs.train(argv(place / name, data, *begin, stage=stage, **settings), world)
    states = {name: final(place / name, 3) for name in worlds}
    for name in ("two", "three"):
        for key, value in states["alone"].items():
            torch.testing.assert_close(states[name][key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
    (place / "three/config.yaml").write_text(
        (place / "three/config.yaml").read_text().replace("max_steps: 3", "max_steps: 4")
    )
    resumed = argv(place / "three", data, "--resume", "auto", stage=1, **{**settings, "max_steps": 4})
    resumed[1] = str(place / "three/config.yaml")
    runs.train(resumed)
    assert len(losses(place / "three")) == 4


def test_what_is_taken_over_and_what_is_refused(tmp_path: Path, imported: Path) -> None:
    config = load_config("nano", {"init_from": str(imported)})
    assert (config.family, config.hidden_size, config.num_layers, config.vocab_size) == ("qwen3", 48, 2, 512)
    assert config.tokenizer == str(imported / "tokenizer")
    assert config.seq_length == 96  # the model's own, which is shorter than the preset's
    assert load_config("nano", {"init_from": str(imported), "seq_length": 32}).seq_length == 32
    long = shutil.copytree(imported, tmp_path / "long")
    settings = yaml.safe_load((long / "config.yaml").read_text()) | {"seq_length": 131072}
    (long / "config.yaml").write_text(yaml.safe_dump(settings))
    assert load_config("nano", {"init_from": str(long)}).seq_length == load_config("nano").seq_length
    step = imported / "checkpoints/step-00000000"
    assert load_config("nano", {"init_from": str(step)}).tokenizer == str(imported / "tokenizer")
    assert weights_of(str(imported), config.tokenizer) == step
    with pytest.raises(UserError, match="has a tokenizer of its own, and this run would be prepared with Lumina's"):
        weights_of(str(imported), None)
    assert load_config("nano", {"init_from": str(tmp_path / "gone")}).hidden_size == load_config("nano").hidden_size


def test_prepared_data_follow_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The account of everything, masks, cuts at messages, and what workers make of it in processes of their own."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = open_tokenizer(folder)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"hello there {i}"},
                {"role": "assistant", "content": "how <|im_end|> are you?"},
            ]
            * (1 + i % 9)
        }
        for i in range(60)
    ]
    chats += [{"text": "our dog was a surprise"}, {"messages": [{"role": "user", "content": "no answer"}]}]
    (tmp_path / "in.jsonl").write_bytes(b"".join(orjson.dumps(c) + b"\n" for c in chats))
    sets = [f"tokenizer={folder}", "vocab_size=512", "seq_length=64", f"cache_dir={tmp_path / 'cache'}"]
    config = load_config("nano", {"train_data": [str(tmp_path / "in.jsonl")]}, sets)
    dataset, _ = prepare_splits(config, tokenizer)
    account = dataset.account
    turns = sum(len(c.get("messages", ["text"])) for c in chats)
    assert account["messages"] == turns
    assert account["messages_trained"] + account["messages_masked"] + sum(account["messages_dropped"].values()) == turns
    assert account["overlong_conversations"] > 0
    supervised = []
    for sample in range(dataset.num_samples):
        batch = dataset.batch([sample, -1])
        assert batch.ids_T.max() < 400
        supervised += batch.targets_T[batch.weights_T == 1].tolist()
        for chunk in dataset.chunks_of(sample):
            assert chunk.context or int(chunk.ids[0]) in (1, 2)  # split where a message begins, or a text
    answers = sum(len(c["messages"]) // 2 for c in chats[:60])
    own = [*tokenizer.encode("how <|im_end|> are you?"), 2]
    assert sorted(supervised) == sorted(own * answers + [*tokenizer.encode("our dog was a surprise"), 2])

    changed = write_tokenizer(tmp_path / "other", CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    assert prepare_splits(config, open_tokenizer(changed))[0].fingerprint != dataset.fingerprint
    line = ["inspect", str(tmp_path / "in.jsonl"), "--config", "nano", *(word for s in sets for word in ("--set", s))]
    capsys.readouterr()
    assert main([*line, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "<|im_start|>user\nhello there" in shown["documents"][0]["text"]


def test_workers_prepare_the_same(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina.data.preparing.preparation.MIN_TASK_BYTES", 2000)
    monkeypatch.setattr("lumina.data.preparing.preparation.MAX_TASK_BYTES", 2000)
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    made = []
    for name, enough in (("here", 1 << 30), ("workers", 1)):
        monkeypatch.setattr("lumina.data.preparing.pool.BYTES_PER_WORKER", enough)
        sets = ["seq_length=64", f"cache_dir={tmp_path / name}", "num_workers=2"]
        made.append(prepare_splits(load_config("nano", {"train_data": [str(data)]}, sets), tokenizer)[0])
    here, there = ([path.read_bytes() for path in sorted(d.folder.glob("*.arrow"))] for d in made)
    assert here == there


def test_a_small_vocabulary_for_other_tests(runs: Runs, place: Path, data: Path) -> None:
    """small_tokenizer's promise: a run from nothing with a vocabulary of its own."""
    folder = write_tokenizer(place / "tokenizer")
    runs.train(real.arguments(place / "run", data, **small_vocabulary(folder), max_steps=2))
    assert len(losses(place / "run")) == 2
    assert load(place / "run", precision="fp32").config.vocab_size == 512
