"""Sample answers and step times in real runs: the answers are those that `lumina generate` gives from the checkpoint of
the same step, under ZeRO-3 on two ranks as alone, and without the tokenizer's files; a step's time is accounted for."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lumina import Callback, Context, load_config, train
from lumina.chat import Conversation, Message
from lumina.chat.hf import bounded
from lumina.infer import Sampling, generate, load
from lumina.train.deepspeed import PHASES, StepTimer
from lumina.train.deepspeed.timing import PhaseTimes
from tests.runs import Runs, arguments, newest, steps, write_conversations
from tests.small_tokenizer import VOCABULARY, write_tokenizer

PROMPTS = ["How is the weather?", "Say something long about my sister, please."]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    started = Runs(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()


def kept(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def _note_laps(file: Path, rank: int) -> None:
    """Rank 0's step timer says between which two readings of the clock each of its laps is."""
    plain = StepTimer.lap

    def lap(self: StepTimer) -> PhaseTimes:
        before = time.perf_counter()
        found = plain(self)
        if rank == 0:
            with file.open("a", encoding="utf-8") as laps:
                laps.write(json.dumps([before, time.perf_counter()]) + "\n")
        return found

    StepTimer.lap = lap  # type: ignore[method-assign]


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (3, 2)])
def test_answers_and_times_of_a_run(runs: Runs, tmp_path: Path, stage: int, world: int) -> None:
    data = write_conversations(tmp_path / "train.jsonl", 30, seed=1)
    run = tmp_path / "run"
    prompts = json.dumps([*PROMPTS, "too long " * 200])
    argv = arguments(
        run, data, stage=stage, max_steps=4, eval_every_n_batches=2, save_every_n_batches=2, eval_fraction=0.2,
        batch_size=2, global_batch_size=8, learning_rate=3e-3, precision="fp32", sample_tokens=6,
        sample_prompts=prompts,
    )  # fmt: skip
    job = runs.start(argv, world, partial(_note_laps, tmp_path / "laps"))
    assert job.wait() == [0] * world, job.stderr()
    assert "fills the context" in job.stderr()

    records = kept(run)
    assert [record["step"] for record in records] == [2, 4]
    saved = newest(run)
    assert saved.name.endswith("4")
    loaded = load(str(saved))
    asked = [loaded.tokenizer.prompt_ids(Conversation((Message("user", prompt),))) for prompt in PROMPTS]
    wanted = generate(loaded.model, loaded.tokenizer, asked, Sampling(temperature=0, max_length=6))
    assert records[-1]["answers"] == [
        {"prompt": prompt, "answer": loaded.tokenizer.decode(answer.ids)}
        for prompt, answer in zip(PROMPTS, wanted, strict=True)
    ]
    assert any(answer["answer"] for answer in records[-1]["answers"])

    taken, laps = steps(run), [json.loads(line) for line in (tmp_path / "laps").read_text().splitlines()]
    assert len(laps) == 1 + len(taken)  # the first is that of what came before the steps
    for record, (began, ended) in zip(taken, pairwise(laps), strict=True):
        split = record["seconds"]
        assert set(split) <= set(PHASES)
        assert all(split[name] > 0 for name in ("data", "forward", "backward", "communication", "optimizer"))
        # The phases add up to the time between two laps; the record has them in microseconds.
        assert ended[0] - began[1] - 1e-4 <= sum(split.values()) <= ended[1] - began[0] + 1e-4
        assert record["supervised_tokens_per_s"] / record["tokens_per_s"] == pytest.approx(
            record["supervised_tokens"] / record["tokens"]
        )
    assert [record["time"] for record in taken] == sorted(record["time"] for record in taken)
    assert "evaluation" in taken[2]["seconds"]
    assert "saving" in taken[2]["seconds"]


def test_a_tokenizers_folder_may_be_removed_once_the_run_has_begun(
    conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tokenizer's process has ended since, for want of steps to make."""
    monkeypatch.setattr(bounded, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(bounded, "STEP_SECONDS", 37.0)  # a process of this test's own
    source = write_tokenizer(tmp_path / "source")

    class Removes(Callback):
        def at_start(self, context: Context) -> None:
            shutil.rmtree(source)
            running = bounded._process(37.0, bounded.STEP_BYTES, "")._running
            assert running is not None
            assert running[0].wait(60) == 0

    files = {"tokenizer": str(source), "train_data": [str(conversations)], "output_dir": str(tmp_path)}
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "seq_length": 64}
    asked = {"sample_prompts": ["hello there"], "sample_tokens": 3, "eval_fraction": 0.2}
    more = {"vocab_size": VOCABULARY, "max_steps": 1, "batch_size": 2, "num_workers": 1, "precision": "fp32"}
    run = train(load_config("nano", **files, **shape, **asked, **more), [Removes()])
    assert run.exit_code == 0
    (record,) = kept(run.folder)
    assert [answer["prompt"] for answer in record["answers"]] == ["hello there"]
