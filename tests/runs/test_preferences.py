"""Preference training: real runs under every ZeRO stage; the reference model's part is computed once and kept."""

from __future__ import annotations

import math
import re
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.runs as real
from lumina import checkpoint
from lumina.chat import open_tokenizer
from lumina.cluster import EXIT_HUNG
from lumina.config import load
from lumina.data import GlobalOrder, PairDataset, prepare_pairs
from lumina.infer import import_hf
from lumina.monitor import read_metrics
from lumina.monitor.reports.html import render
from lumina.monitor.reports.run_data import read
from tests.infer.hf_models import make_hf
from tests.runs import Runs, differing, final, held_at, losses
from tests.runs.pairs import write_pairs

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

PAIRS = 11  # no world size or micro-batch here divides it


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_hf(folder / "hf", "llama2")
    return import_hf(folder / "hf", folder / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS, seed=5)


def argv(run: Path, data: Path, base: Path | None, *words: str, stage: int = 0, **settings: Any) -> list[str]:
    line = ["--config", "nano", "--train-data", str(data), "--output-dir", str(run.parent)]
    line += ["--experiment-name", run.name, "--ds_config", str(real.ROOT / "ds_configs" / f"zero{stage}.json"), *words]
    line += ["--init-from", str(base)] if base is not None else []
    chosen = {
        "objective": "dpo",
        "dpo_beta": 0.2,
        "epochs": 100,
        "learning_rate": 1e-3,
        "precision": "fp32",
        **settings,
    }
    return line + [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]


def rewards(run: Path, kind: str = "step") -> list[list[float]]:
    names = ("chosen", "rejected", "accuracies", "margins")
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]
    return [[record[f"rewards/{name}"] for name in names] for record in records]


def _without_accuracy(figures: list[float]) -> list[float]:
    """Where the model still is its reference, rounding decides which answer it prefers."""
    return [*figures[:2], figures[3]]


def test_one_step_does_not_depend_on_how_it_is_cut(runs: Runs, place: Path, base: Path, data: Path) -> None:
    """Laws 1 and 2, with the whole set in one step. A second one, so that the margins are not all zero."""
    more = {"global_batch_size": 16, "max_steps": 2, "max_grad_norm": 0, "warmup_ratio": 0, "lr_scheduler": "constant"}
    runs.train(argv(place / "reference", data, base, batch_size=1, **more))
    expected = final(place / "reference", 2)
    first = _without_accuracy(rewards(place / "reference")[0])
    assert first == pytest.approx([0.0] * 3, abs=1e-4)  # it still is its own reference
    assert losses(place / "reference")[0] == pytest.approx(math.log(2), rel=1e-6)
    for number, (stage, world, micro) in enumerate([(0, 1, 4), (1, 2, 1), (2, 2, 2), (3, 2, 1), (3, 3, 2)]):
        run = place / f"run-{number}"
        runs.train(argv(run, data, base, stage=stage, batch_size=micro, **more), world)
        assert losses(run) == pytest.approx(losses(place / "reference"), rel=1e-5)
        assert rewards(run)[1] == pytest.approx(rewards(place / "reference")[1], rel=1e-3)
        found = final(run, 2)
        for key in (key for key in expected if key[0] == "exp_avg"):
            difference = (found[key] - expected[key]).double().norm() / expected[key].double().norm()
            assert difference <= 1e-4, (run.name, key)


@pytest.mark.parametrize(("stage", "world", "rank"), [(2, 2, 0), pytest.param(3, 2, 4, marks=pytest.mark.long)])
def test_killed_and_resumed_bit_for_bit(
    runs: Runs, place: Path, base: Path, data: Path, stage: int, world: int, rank: int
) -> None:
    settings = {"stage": stage, "max_steps": 12, "save_every_n_batches": 3, "batch_size": 1, "lora_rank": rank}
    runs.train(argv(place / "whole", data, base, **settings), world)
    line = argv(place / "killed", data, base, **settings)
    job = runs.start(line, world, partial(held_at, 11))
    job.wait_for_step(7)
    job.wait_for_checkpoint()
    job.kill()
    run = place / "killed"
    (kept,) = run.glob("reference/*.npy")
    once, values = kept.stat().st_mtime_ns, kept.read_bytes()
    resumed = ["--config", str(run / "config.yaml"), "--resume", "auto", *line[line.index("--train-data") :]]
    runs.train(resumed, world)
    assert kept.stat().st_mtime_ns == once, "the reference was computed a second time"
    assert differing(final(run, 12), final(place / "whole", 12)) == []

    # Lost, it is computed anew from what the run began with, not from what it has become.
    kept.write_bytes(values[:-1] + bytes([values[-1] ^ 1]))
    again = runs.train(resumed, world)
    assert "computed anew" in again.stderr()
    assert kept.read_bytes() == values


def test_a_step_of_pairs_without_a_supervised_token_moves_nothing(
    runs: Runs, place: Path, base: Path, data: Path
) -> None:
    """No weight, no moment, no decay, and its record says so. Such pairs are skipped now; a cache of an earlier version
    may hold some, so one is made."""
    run, batch = place / "run", 4
    more = {"cache_dir": place / "cache", "global_batch_size": batch, "max_steps": 3, "save_every_n_batches": 1}
    more |= {"keep_last": 9, "save_async": False, "weight_decay": 0.5, "warmup_ratio": 0.0, "lr_scheduler": "constant"}
    line = argv(run, data, base, stage=2, batch_size=1, live_view=False, **more)
    own = [word for flag, word in pairwise(line) if flag == "--set"]
    config = load(str(base / "config.yaml"), {"train_data": [str(data)]}, own)
    pairs = prepare_pairs([data], config, open_tokenizer(config.tokenizer, config.chat_template))
    silent = GlobalOrder(PAIRS, batch, config.seed, pairs.fingerprint).indices(1)
    mask, offsets = (np.load(pairs.folder / f"{name}.npy") for name in ("mask", "offsets"))
    for pair in silent.tolist():
        mask[offsets[2 * pair] : offsets[2 * pair + 2]] = 0
    np.save(pairs.folder / "mask.npy", mask)

    runs.train(line, 2)
    assert list((place / "cache").rglob("pairs-*/")) == [pairs.folder]
    saved = [real.state(run / "checkpoints" / checkpoint.name_of(step)) for step in (1, 2, 3)]
    assert differing(saved[0], saved[1]) == []
    assert len(differing(saved[1], saved[2])) > len(saved[1]) // 2
    records = real.steps(run)
    assert [(r["supervised_tokens"] > 0, r["loss"] is not None, r["applied"]) for r in records] == [
        (True, True, True),
        (False, False, False),
        (True, True, True),
    ]
    assert [[value is not None for value in figures] for figures in rewards(run)] == [
        [True] * 4,
        [False] * 4,
        [True] * 4,
    ]


def test_the_loss_falls_to_the_preferred_answers(runs: Runs, place: Path, base: Path, data: Path) -> None:
    held_out = write_pairs(place / "eval.jsonl", 9, seed=6)
    run = place / "run"
    more = {"max_steps": 15, "batch_size": 3, "eval_every_n_batches": 5, "precision": "bf16"}
    trained = runs.train(argv(run, data, base, "--eval-data", str(held_out), stage=2, **more), 2)
    assert losses(run)[-1] < 0.5 * losses(run)[0]
    evaluations = [r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "eval"]
    assert len(evaluations) == 3
    assert evaluations[-1] < evaluations[0] < math.log(2)
    assert len(list(run.glob("reference/*.npy"))) == 2
    # Margin, accuracy and rewards: in the console and the log, in the metrics, in the report.
    last = rewards(run, "eval")[-1]
    assert last[3] == pytest.approx(last[0] - last[1], abs=1e-5)
    assert last[3] > 0
    assert last[2] > 0.5
    evaluated = f"| Margin: {last[3]:.4f} | Accuracy: {last[2]:.4f} | Chosen: {last[0]:.4f} | Rejected: {last[1]:.4f} |"
    assert evaluated in trained.stdout()
    assert evaluated in (run / "train.log").read_text()
    first = (
        r"Loss: 0\.69\d+ \| Margin: -?0\.0\d+ \| Accuracy: [\d.]+ \| Chosen: -?0\.0\d+ \| Rejected: -?0\.0\d+ \| LR:"
    )
    assert re.search(first, trained.stdout())
    for title in ("Reward margin", "Reward accuracy", "Rewards"):
        assert f'"title":"{title}"' in render([read(run)])
    assert "11 lines: 11 preference pairs" in (run / "train.log").read_text()
    assert all(torch.isfinite(value).all() for value in final(run, 15).values())


def test_what_is_refused(runs: Runs, place: Path, base: Path, data: Path) -> None:
    assert "Add --init-from RUN" in runs.refusal(argv(place / "a", data, None))
    chats = real.write_conversations(place / "chats.jsonl", 5, seed=1)
    assert "no preference pair in" in runs.refusal(argv(place / "b", chats, base))
    assert "eval_fraction is not for preference pairs" in runs.refusal(argv(place / "c", data, base, eval_fraction=0.2))


@pytest.mark.long  # as tests/train/agreement/test_store.py has it for the run's log
def test_a_reference_that_cannot_be_kept_ends_every_rank(runs: Runs, data: Path, base: Path, place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "reference").write_text("")
    job = runs.start(argv(place / "run", data, base, max_steps=1), 2)
    assert job.wait() == [2, 2], job.stderr()
    assert "Traceback" not in job.stderr()


def _stuck_reader(rank: int) -> None:
    """The second batch of pairs is never read."""
    whole, calls = PairDataset.batch, []

    def batch(self: PairDataset, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            time.sleep(600)
        return whole(self, *given)

    PairDataset.batch = batch  # type: ignore[method-assign]


@pytest.mark.long  # tests/train/liveness/test_watching.py has what is watched, and this that it is
def test_a_hang_in_the_reference_pass_is_ended(runs: Runs, data: Path, base: Path, place: Path) -> None:
    job = runs.start(argv(place / "run", data, base, batch_size=2, hang_timeout=2.0), 1, patch=_stuck_reader)
    assert job.wait() == [EXIT_HUNG], job.stderr()
    assert "in: reference log-probabilities" in job.stderr()
