"""From a path to a model: what a path means, what is refused, and that nothing in it is executed."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch

from lumina.cli import main
from lumina.config import UserError
from lumina.infer import find_checkpoint, load
from tests.infer.damage import Payload
from tests.infer.small_models import make_model, write_run, write_small_run


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def test_the_weights_are_the_runs_weights_whatever_the_world_size(tmp_path: Path) -> None:
    model = make_model(seed=5, tie_word_embeddings=False)
    for world in (1, 3):
        loaded = load(write_run(tmp_path / f"w{world}", model, world=world), precision="fp32")
        assert loaded.step == 5
        own = dict(loaded.model.named_parameters())
        assert own.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert torch.equal(own[name], parameter), name


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    loaded = load(write_run(tmp_path / "run", make_model()), precision="bf16")
    assert loaded.model.output.weight is loaded.model.embedding.weight
    assert loaded.model.output.weight.dtype is torch.bfloat16


def test_a_run_means_its_best_checkpoint_else_its_newest(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1), steps=(2, 4, 6))
    assert step_of(find_checkpoint(run)) == 6
    assert step_of(find_checkpoint(run / "checkpoints/step-00000002")) == 2
    (run / "checkpoints/best.json").write_text(json.dumps({"step": 4, "loss": 1.0}))
    for path in (run, run / "best", run / "checkpoints", run / "checkpoints/best", str(run)):
        assert step_of(find_checkpoint(path)) == 4
    assert step_of(find_checkpoint(run / "checkpoints/step-00000006")) == 6


def test_damage_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1), steps=(2, 4))
    victim = run / "checkpoints/step-00000004/rank-00001-of-00002.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert step_of(find_checkpoint(run)) == 2
    assert "step-00000004 is damaged: rank-00001-of-00002.safetensors does not match its hash" in caplog.text
    (run / "checkpoints/step-00000002/manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint under .* is whole"):
        find_checkpoint(run)


def test_a_model_that_was_trained_with_other_rotary_angles_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its trainer.json is as version 0.2.0 wrote it."""
    load(write_small_run(tmp_path / "long", seq_length=2**17 + 1))
    load(write_small_run(tmp_path / "short", seq_length=2**17))
    (said,) = [record.getMessage() for record in caplog.records if "rotary angles" in record.getMessage()]
    assert said.startswith(f"{tmp_path}/long/checkpoints/step-00000005: its 5 steps")


def test_the_seeds_spelling_is_the_newest_runs_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"best_model.pt does not exist, and no run"):
        find_checkpoint("checkpoints/best_model.pt")
    write_run(tmp_path / "experiments/old", make_model(num_layers=1), steps=(9,))
    new = write_run(tmp_path / "experiments/new", make_model(num_layers=1), steps=(2, 4))
    (new / "checkpoints/best.json").write_text(json.dumps({"step": 2, "loss": 1.0}))
    caplog.set_level(logging.INFO)
    assert find_checkpoint("checkpoints/best_model.pt") == Path("experiments/new/checkpoints/step-00000002")
    assert "using the best checkpoint of the newest run, experiments/new" in caplog.text


def test_a_pickle_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    pickle.loads(payload)
    assert marker.exists()  # the payload works where it is opened
    marker.unlink()
    Path("checkpoints").mkdir()
    Path("checkpoints/best_model.pt").write_bytes(payload)
    with pytest.raises(UserError, match="is a file: a checkpoint is a folder of safetensors and a pickle can run code"):
        find_checkpoint("checkpoints/best_model.pt")
    run = write_run(tmp_path / "run", make_model(num_layers=1), world=1)
    checkpoint = run / "checkpoints/step-00000005"
    rank = checkpoint / "rank-00000-of-00001.safetensors"
    rank.write_bytes(payload + bytes(rank.stat().st_size))  # of a believable size; what follows a pickle is not read
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    import hashlib

    for entry in manifest["files"]:
        data = (checkpoint / entry["name"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))  # the hashes fit: only the format is wrong
    with pytest.raises(UserError, match="cannot be read"):
        load(run)
    assert not marker.exists()


def test_what_does_not_fit_together_is_one_clear_message(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1))
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("num_layers: 1", "num_layers: 2"))
    with pytest.raises(UserError, match=r"written by another model: this one also needs blocks\.1"):
        load(run)
    config.write_text(text.replace("intermediate_size: null", "intermediate_size: 128"))
    with pytest.raises(UserError, match=r"gate_up.weight has .* elements"):
        load(run)
    config.write_text(text.replace("num_heads: 4", "num_heads: 5"))
    with pytest.raises(UserError, match="hidden_size 64 is not a multiple of num_heads 5"):
        load(run)
    config.unlink()
    with pytest.raises(UserError, match="cannot read"):
        load(run)
    with pytest.raises(UserError, match="no checkpoint at"):
        load(tmp_path / "nowhere")


def test_the_command_answers_the_same_for_the_same_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", make_model(seed=6))
    line = ["generate", "--resume", str(run), "--prompt", "Hello", "--max-length", "12", "--seed", "3"]
    assert main(line) == 0
    spoken = capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] + "\n" == spoken
    assert (result["tokens"], result["finish_reason"], result["seed"]) == (12, "length", 3)
    assert result["prompt_tokens"] == 6


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1))
    assert main(["generate", "--resume", str(run), "--prompt", "word " * 200]) == 2
    assert "error: the prompt has" in capsys.readouterr().err
    assert main(["generate", "--resume", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "error: no checkpoint at" in capsys.readouterr().err
