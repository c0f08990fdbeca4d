"""What is refused before torch is loaded, and the question about a large model on a CPU."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.cli import main
from lumina.commands import checks
from lumina.config import Config, UserError, load
from tests.runs import clean_environment

WITHOUT_TORCH = """
import sys
from lumina.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was loaded first"
sys.exit(code)
"""
ENDS_AT_TORCH = """
import importlib.abc, os, sys

class Torch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(99)

sys.meta_path.insert(0, Torch())
from lumina.cli import main
sys.exit(main(sys.argv[1:]))
"""
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello to you"}]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data.jsonl, a file in the way, a run with a checkpoint and bad DeepSpeed files."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "made/there/checkpoints/step-00000004").mkdir(parents=True)
    for name, text in {
        "stage4": '{"zero_optimization": {"stage": 4}}',
        "torn": "{",
        "elastic": '{"elasticity": {}}',
        "words": '{"zero_optimization": {"stage": "two"}}',
        "flat": '{"zero_optimization": 2}',
        "batch": '{"train_micro_batch_size_per_gpu": "many"}',
        "adam": '{"optimizer": []}',
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train --config nano --train-data gone.jsonl", "data file gone.jsonl does not exist"),
        ("train --config nano --train-data .", "is a folder, not a file"),
        ("train --config nano --train-data data.jsonl --eval-data gone.jsonl", "gone.jsonl does not exist"),
        (
            "train --config nano --train-data data.jsonl --ds_config gone.json",
            "cannot read the DeepSpeed configuration",
        ),
        ("train --config nano --train-data data.jsonl --ds_config stage4.json", "`zero_optimization.stage` is 4"),
        ("train --config nano --train-data data.jsonl --ds_config words.json", "`zero_optimization.stage` is 'two'"),
        ("train --config nano --train-data data.jsonl --ds_config flat.json", "zero_optimization"),
        ("train --config nano --train-data data.jsonl --ds_config batch.json", "train_micro_batch_size_per_gpu"),
        ("train --config nano --train-data data.jsonl --ds_config adam.json", "optimizer"),
        ("train --config nano --train-data data.jsonl --ds_config torn.json", "line 1, column 2: not valid JSON"),
        ("train --config nano --train-data data.jsonl --ds_config elastic.json", "`elasticity` is not supported"),
        ("train --config nano --train-data data.jsonl --output-dir file", "file is a file"),
        ("train --config nano --train-data data.jsonl --output-dir made --experiment-name there", "--resume auto"),
        ("train --config nano --train-data data.jsonl --resume gone", "gone"),
        ("train --config nano --train-data data.jsonl --init-from gone", "gone"),
        ("train --config nano --train-data data.jsonl --set tokenizer=gone", "tokenizer gone is no folder"),
        ("train --config nano --train-data data.jsonl --set learning_rat=1", "Did you mean `learning_rate`?"),
        ("train --config nano --train-data data.jsonl --experiment-name a/b", "is no name of one folder"),
        ("train --config nano --train-data data.jsonl --experiment-name ..", "is no name of one folder"),
        ("generate gone --prompt x", "gone"),
        ("generate --prompt x", "Give one: lumina generate RUN --prompt TEXT."),
        ("generate --resume file --prompt x", "a checkpoint is a folder of safetensors"),
        ("chat gone", "gone"),
        ("serve gone", "gone"),
        ("export gone out", "gone"),
        ("evaluate gone --data data.jsonl", "gone"),
        ("evaluate made/there --data gone.jsonl", "data file gone.jsonl does not exist"),
        ("report gone", "gone"),
        ("train --config nano --train-data data.jsonl --lora-rank 4", "trains adapters over the weights of another"),
        ("train --config nano --train-data data.jsonl --objective dpo", "moves a model away from what it began as"),
        ("import gone out", "there is no such folder"),
        ("import a/b out", "hf download a/b --local-dir DIR"),
        ("import data.jsonl out", "it is a file"),
        ("import made file", "file already holds something"),
        ("import made file/out", "is a file: file/out cannot be a folder"),
        ("import made out --chat-template gone", "neither a file nor a stock template"),
        ("export made/there out --shard-size big", "shard size big is not a size"),
        ("export made/there made", "made already holds something"),
        ("generate made/there --prompt x --tools gone.json", "gone.json"),
        ("chat made/there --tools gone.json", "gone.json"),
    ],
)
def test_refused_before_torch(place: Path, line: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH, *line.split()],
        cwd=place,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert says in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "train --config nano --train-data data.jsonl",
        "train --config nano --train-data data.jsonl --output-dir made --experiment-name there --resume auto",
        "generate made/there --prompt x",
        "chat made/there",
        "serve made/there",
        "evaluate made/there --data data.jsonl",
        "export made/there out",
        "import made out",
    ],
)
def test_the_first_word_comes_before_torch(place: Path, line: str) -> None:
    """Loading it takes seconds, in which a command would be silent."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", ENDS_AT_TORCH, *line.split()],
        cwd=place,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 99, done.stderr
    assert (done.stdout + done.stderr).strip()


def test_a_folder_that_may_not_be_written_to(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="may not be written to by this user"):
        checks.writable_folder(place / "a/b")


# --- A large model on a CPU -----------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, answer: str) -> _Terminal:
    said = _Terminal()
    monkeypatch.setattr(sys, "stdin", _Terminal(answer))
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(checks, "_GPU_DEVICES", ())
    return said


@pytest.fixture
def medium(place: Path) -> Config:
    return load("medium", {"train_data": [str(place / "data.jsonl")], "output_dir": str(place / "experiments")})


@pytest.mark.parametrize("answer", ["y\n", "yes\n"])
def test_a_large_model_is_trained_when_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, medium: Config, answer: str
) -> None:
    said = on_a_terminal(monkeypatch, answer)
    checks.before_training(medium, yes=False)
    assert "369 M parameters on" in said.getvalue()
    assert "--config nano" in said.getvalue()


@pytest.mark.parametrize("answer", ["\n", "n\n", ""])
def test_and_else_is_not(monkeypatch: pytest.MonkeyPatch, medium: Config, answer: str) -> None:
    on_a_terminal(monkeypatch, answer)
    with pytest.raises(UserError, match=r"not started(.|\n)*--yes"):
        checks.before_training(medium, yes=False)


@pytest.mark.parametrize(("terminal", "yes"), [(False, False), (True, True)])
def test_nobody_is_asked_who_cannot_answer_or_has_answered(
    monkeypatch: pytest.MonkeyPatch, medium: Config, caplog: pytest.LogCaptureFixture, terminal: bool, yes: bool
) -> None:
    """A launcher, a script or a pipe would wait for ever: it is said, and the run goes on."""
    said = on_a_terminal(monkeypatch, "")
    if not terminal:
        monkeypatch.setattr(sys, "stdin", io.StringIO())
    with caplog.at_level(logging.INFO):
        checks.before_training(medium, yes=yes)
    assert "?" not in said.getvalue()
    assert "369 M parameters on" in caplog.text


def test_a_small_one_is_not_asked_about(monkeypatch: pytest.MonkeyPatch, medium: Config) -> None:
    said = on_a_terminal(monkeypatch, "")
    checks.before_training(load("small", {"train_data": medium.train_data, "output_dir": medium.output_dir}), yes=False)
    assert said.getvalue() == ""


@pytest.mark.parametrize(
    ("name", "value", "beside"),
    [
        ("early_stopping_patience", 2, {"eval_fraction": 0.1}),
        ("eval_every_n_batches", 50, {"eval_fraction": 0.1}),
        ("sample_prompts", ["hello"], {"eval_fraction": 0.1}),
        ("lora_alpha", 4.0, {"lora_rank": 2, "resume": "auto"}),
        ("lora_dropout", 0.5, {"lora_rank": 2, "resume": "auto"}),
        ("lora_targets", ["q_proj"], {"lora_rank": 2, "resume": "auto"}),
        ("dpo_beta", 0.2, {"objective": "dpo", "resume": "auto"}),
        ("router_z_loss_coef", 0.1, {"family": "mixtral", "experts": {"count": 4, "per_token": 2}}),
    ],
)
def test_a_setting_that_does_nothing_is_told(
    medium: Config, caplog: pytest.LogCaptureFixture, name: str, value: object, beside: dict[str, object]
) -> None:
    """By itself, but not beside the settings that it needs."""
    small = load("nano", {"train_data": medium.train_data, "output_dir": medium.output_dir})
    checks.before_training(small, yes=False)
    assert "does nothing" not in caplog.text
    checks.before_training(small.replace(**{name: value}), yes=False)
    assert caplog.text.count("does nothing") == 1
    assert f"{name} {value} does nothing: " in caplog.text
    caplog.clear()
    checks.before_training(small.replace(**{name: value}, **beside), yes=False)
    assert "does nothing" not in caplog.text


def test_a_gpu_is_seen_by_its_device_file(tmp_path: Path) -> None:
    assert not checks.has_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert checks.has_gpu(tmp_path)


def test_a_run_is_named_or_given_by_its_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every command that takes a RUN: the name under experiments/ too."""
    monkeypatch.chdir(place)
    (place / "made").rename("experiments")
    for given in ("there", "experiments/there", str(place / "experiments/there")):
        assert checks.trained_model(given).samefile(place / "experiments/there")
    assert main(["checkpoints", "list", "there"]) == 0
    assert main(["report", "there"]) == 2, "it has no metrics"
    assert str(place / "experiments/there") in capsys.readouterr().err
