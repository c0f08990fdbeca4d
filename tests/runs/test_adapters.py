"""Fine-tuning with adapters: real runs under every ZeRO stage, killed and resumed, used by every command."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tests.runs as real
from lumina.cli import main
from lumina.files import file_sha256
from lumina.infer import import_hf, load
from lumina.train import step
from tests.infer.hf_models import make_hf
from tests.runs import Runs, differing, final, held_at, losses, newest, write_conversations

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

# A run may be made longer under this schedule: no step that was taken would have had another learning rate.
CONSTANT = {"lr_scheduler": "constant", "warmup_ratio": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2: biases of queries, keys and values, which adapters leave alone."""
    folder = tmp_path_factory.mktemp("base")
    make_hf(folder / "hf", "qwen2")
    return import_hf(folder / "hf", folder / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "train.jsonl", 40, seed=5)


def argv(run: Path, data: Path, base: Path | None, *words: str, stage: int = 0, **settings: Any) -> list[str]:
    line = ["--config", "nano", "--train-data", str(data), "--output-dir", str(run.parent)]
    line += ["--experiment-name", run.name, "--ds_config", str(real.ROOT / "ds_configs" / f"zero{stage}.json"), *words]
    line += ["--init-from", str(base)] if base is not None else []
    chosen = {"lora_rank": 4, "num_workers": 1, "epochs": 100, "learning_rate": 1e-2, "precision": "fp32", **settings}
    return line + [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load(run, precision="fp32").model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_stage_and_world_trains_the_same_adapters(runs: Runs, place: Path, base: Path, data: Path) -> None:
    worlds = {"alone": (0, 1), "one": (1, 2), "two": (2, 2), "three": (3, 2), "trio": (3, 3)}
    settings = {"global_batch_size": 6, "max_steps": 3, "batch_size": 1, **CONSTANT}
    for name, (stage, world) in worlds.items():
        runs.train(argv(place / name, data, base, stage=stage, **settings), world)
    states = {name: final(place / name, 3) for name in worlds}
    for name in worlds.keys() - {"alone"}:
        assert losses(place / name) == pytest.approx(losses(place / "alone"), rel=1e-5)
        assert states[name].keys() == states["alone"].keys()
        for key, value in states["alone"].items():
            torch.testing.assert_close(states[name][key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")

    # Under another stage on another world; the global batch stays.
    run = place / "three"
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("max_steps: 3", "max_steps: 4"))
    ds = str(real.ROOT / "ds_configs" / "zero1.json")
    runs.train(["--resume", str(run), "--experiment-name", "three", "--output-dir", str(place), "--ds_config", ds])
    assert len(losses(run)) == 4


def _draw_more(rank: int) -> None:
    """Random numbers that something else takes between the steps."""
    update = step.update

    def drawing(run: Any, data: Any, limit: Any) -> Any:
        torch.rand(data.step + 1)
        return update(run, data, limit)

    step.update = drawing


@pytest.mark.parametrize(
    ("stage", "world", "precision"),
    [
        pytest.param(2, 2, "bf16", marks=pytest.mark.long),
        pytest.param(3, 2, "fp32", marks=pytest.mark.long),
        (0, 1, "bf16"),
    ],
)
def test_killed_and_resumed_bit_for_bit(
    runs: Runs, place: Path, base: Path, data: Path, stage: int, world: int, precision: str
) -> None:
    """With dropout: what is dropped at a step does not depend on what came before it."""
    settings = {"stage": stage, "max_steps": 10, "save_every_n_batches": 3, "precision": precision, "lora_dropout": 0.2}
    assert runs.start(argv(place / "whole", data, base, **settings), world, patch=_draw_more).wait() == [0] * world
    line = argv(place / "killed", data, base, **settings)
    job = runs.start(line, world, partial(held_at, 9))
    job.wait_for_step(5)
    job.kill()
    resumed = ["--config", str(place / "killed/config.yaml"), "--resume", "auto", *line[line.index("--train-data") :]]
    runs.train(resumed, world)
    assert differing(final(place / "killed", 10), final(place / "whole", 10)) == []


def test_trained_used_and_trained_on(
    runs: Runs, place: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    run, before = place / "tuned", weights(base)
    more = {"max_steps": 20, "batch_size": 4, "sample_prompts": ["hello"], "eval_fraction": 0.2}
    line = argv(run, data, base, stage=2, gradient_checkpointing="true", **more)
    at = line.index("lora_rank=4") - 1
    line[at : at + 2] = ["--lora-rank", "4", "--lora-alpha", "16", "--lora-targets", "q_proj", "v_proj", "up_proj"]
    runs.train(line, 2)
    curve = losses(run)
    assert sum(curve[-4:]) < 0.9 * sum(curve[:4])
    log = (run / "train.log").read_text()
    assert f"of adapters trained over {base}" in log
    assert "layer-dead" not in (run / "events.jsonl").read_text()

    saved = newest(run)
    facts = json.loads((saved / "trainer.json").read_text())
    assert facts["lora"] == {"lora_rank": 4, "lora_alpha": 16.0, "lora_targets": ["q_proj", "up_proj", "v_proj"]}
    of_base = base / "checkpoints/step-00000000"
    assert facts["base"]["checkpoint"] == str(of_base)
    assert facts["base"]["manifest_sha256"] == file_sha256(of_base / "manifest.json")
    size = lambda folder: sum(path.stat().st_size for path in folder.glob("rank-*"))
    trained = sum(v.numel() for (kind, _), v in final(run, 20).items() if kind == "master")
    assert size(saved) < 3 * 4 * trained + 30_000, (
        "beside the adapters and their moments there is the RNG's state alone"
    )

    after = weights(run)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {
        f"blocks.{n}.{place}.weight" for n in range(2) for place in ("attention.qkv", "feed_forward.gate_up")
    }
    rows = after["blocks.0.attention.qkv.weight"] != before["blocks.0.attention.qkv.weight"]
    config = load(run, precision="fp32").config
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    assert rows[:q].any()
    assert not rows[q : q + k].any()  # no adapter of k_proj
    assert rows[q + k :].any()

    capsys.readouterr()
    evaluated = {}
    for name in (base, run):
        assert main(["evaluate", str(name), "--data", str(data), "--json"]) == 0
        evaluated[name] = json.loads(capsys.readouterr().out)["loss"]
    assert evaluated[run] < 0.9 * evaluated[base]
    assert main(["generate", "--resume", str(run), "--prompt", "hello", "--temperature", "0", "--max-length", "4"]) == 0
    assert main(["export", str(run), str(place / "hf")]) == 0
    assert main(["export", str(run), str(place / "adapter"), "--format", "peft"]) == 0
    ids = torch.randint(0, 300, (1, 30))
    start = AutoModelForCausalLM.from_pretrained(base.parent / "hf", dtype=torch.float32)
    with torch.no_grad():
        own = load(run, precision="fp32").model(ids, torch.arange(30)[None])
        theirs = peft.PeftModel.from_pretrained(start, place / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(place / "hf").eval()(ids).logits
    rounding = 1e-5 * float(own.abs().max())  # float32, in another order of sums
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=rounding)
    torch.testing.assert_close(merged, own, rtol=1e-5, atol=1e-5)

    # Adapters over adapters, and every weight from there: both begin at the merged model.
    runs.train(argv(place / "again", data, run, stage=3, max_steps=1, learning_rate=1e-12, min_lr=0), 2)
    runs.train(argv(place / "whole", data, run, max_steps=1, learning_rate=1e-12, min_lr=0, lora_rank=0))
    for name in ("again", "whole"):
        for key, value in weights(place / name).items():
            torch.testing.assert_close(value, after[key], rtol=0, atol=1e-9, msg=f"{name} {key}")


def test_what_is_refused(runs: Runs, place: Path, base: Path, data: Path) -> None:
    alone = real.arguments(place / "alone", data, lora_rank=4, max_steps=1)
    assert "trains adapters over the weights of another run, and none is given" in runs.refusal(alone)
    wrong = argv(place / "wrong", data, base, max_steps=1, lora_targets="[q_prog]")
    assert "lora_targets" in runs.refusal(wrong)

    lent = shutil.copytree(base, place / "lent")
    run = place / "run"
    runs.train(argv(run, data, lent, max_steps=2, **CONSTANT))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for changes in ({"lora_rank": 2}, {"lora_rank": 0}, {"lora_targets": ["q_proj"]}):
        (place / "other.yaml").write_text(yaml.safe_dump(settings | changes | {"max_steps": 4}))
        line = ["--config", str(place / "other.yaml"), "--resume", "auto", "--set", f"tokenizer={run / 'tokenizer'}"]
        assert "has other adapters" in runs.refusal(line)
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"max_steps": 4}))
    lent.rename(place / "away")
    again = ["--resume", str(run), "--experiment-name", "run", "--output-dir", str(place)]
    assert "lent/checkpoints/step-00000000, which is not there" in runs.refusal(again)
    (place / "away").rename(lent)
    runs.train(again)
    assert len(losses(run)) == 4
