"""Whole runs over a base of another shape than the preset's: at a longer context with scaled rotary angles, killed and
resumed by the command that began them, and then used."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from lumina.cli import main
from lumina.infer import import_hf, load
from lumina.monitor import read_run
from tests.infer.hf_models import make_hf
from tests.runs import Runs, differing, final, held_at, losses, write_conversations
from tests.runs.pairs import write_pairs

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.long,  # three starts a case, and exports: 10 to 20 s each
]

# Of Qwen2's shape at 96 tokens; the preset is a Llama at 512.
LONGER = ["--seq-length", "384", "--rope-scaling", "yarn"]
CASES = {
    "scaled": LONGER,
    "adapters": [*LONGER, "--lora-rank", "4"],
    "preferences": ["--objective", "dpo", "--lora-rank", "4"],
    "plain": [],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_hf(folder / "hf", "qwen2")
    return import_hf(folder / "hf", folder / "run")


@pytest.mark.parametrize("case", CASES)
def test_the_same_command_resumes_it(
    case: str, base: Path, runs: Runs, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it has a checkpoint too; what it ends with is that of a run that nothing broke, bit for bit."""
    write = write_pairs if case == "preferences" else write_conversations
    data = write(place / "train.jsonl", 23, seed=5)

    def line(name: str, *more: str) -> list[str]:
        fixed = {"epochs": 100, "max_steps": 6, "global_batch_size": 4, "num_workers": 1, "save_every_n_batches": 3}
        fixed |= {"learning_rate": 1e-3, "save_async": "false"}
        words = ["--config", "nano", "--train-data", str(data), "--init-from", str(base), "--precision", "fp32"]
        words += ["--output-dir", str(place), "--experiment-name", name, *CASES[case], *more]
        return words + [word for key, value in fixed.items() for word in ("--set", f"{key}={value}")]

    whole, run = place / "whole", place / "run"
    runs.train(line("whole"))
    job = runs.start(line("run", "--resume", "auto"), patch=partial(held_at, 5))  # which begins it
    job.wait_for_step(1)
    job.kill()  # without a checkpoint, or with that of step 3
    job = runs.start(line("run", "--resume", "auto"), patch=partial(held_at, 5))
    job.wait_for_step(4)
    job.kill()
    runs.train(line("run", "--resume", "auto"))
    assert read_run(run)["starts"][-1]["step"] >= 3, "it was resumed"
    assert differing(final(run, 6), final(whole, 6)) == []
    assert losses(run) == losses(whole)
    refused = runs.refusal(line("run", "--resume", "auto", "--set", "rope_theta=7"))
    assert "cannot be resumed with rope_theta 7.0, was 1000000.0" in refused

    loaded = load(run, precision="fp32")
    assert loaded.config.family == "qwen2"
    scaling = loaded.config.rope_scaling
    if case in ("scaled", "adapters"):
        assert scaling is not None
        assert (scaling.type, scaling.factor, scaling.original_max_position_embeddings) == ("yarn", 4, 96)
        assert (
            "rope_scaling: yarn, factor 4 from original_max_position_embeddings 96" in (run / "train.log").read_text()
        )
        _is_used(run, place, data, capsys)
    else:
        assert scaling is None
    if case == "adapters":
        assert main(["export", str(run), str(place / "adapter"), "--format", "peft"]) == 2
        assert "its base has None" in capsys.readouterr().err


def _is_used(run: Path, place: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluated and generated from beyond the base's 96 tokens, and exported: transformers computes the same logits."""
    from transformers import AutoModelForCausalLM

    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert max(int(one["from"]) for one in found["by_position"]) >= 128
    prompt = "hello there, how are you today? " * 25
    assert main(["generate", str(run), "--prompt", prompt, "--max-length", "8", "--json"]) == 0
    capsys.readouterr()
    assert main(["export", str(run), str(place / "merged")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(place / "merged").eval()
    ids = torch.randint(0, 300, (1, 300))
    with torch.no_grad():
        own = load(run, precision="fp32").model(ids, torch.arange(300)[None])
        torch.testing.assert_close(own, theirs(ids).logits, rtol=1e-4, atol=1e-4)
