"""What a killed and resumed run leaves: one curve in metrics.jsonl and in TensorBoard, and every start in run.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Runs, arguments, steps, write_conversations

from lumina.monitor.run_data import read
from lumina.monitor.run_file import read_run
from lumina.monitor.run_report import render
from lumina.monitor.runs import list_runs

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    started = Runs(tmp_path)
    yield started
    started.close()


def test_killed_and_resumed_on_two_ranks(runs: Runs, tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "train.jsonl", 40, seed=1)
    run = tmp_path / "experiments" / "run"
    settings = {"max_steps": 9, "save_every_n_batches": 3, "eval_every_n_batches": 3, "eval_fraction": 0.2}
    argv = [*arguments(run, data, stage=1, global_batch_size=8, **settings), "--tracker", "tensorboard"]
    first = runs.start(argv)
    first.wait_for_step(5)
    first.kill()
    assert list_runs(run.parent)[0]["state"] == "stale"
    runs.train([*argv, "--resume", "auto", "--set", "system_metrics_seconds=0.2"], world=2)

    taken = steps(run)
    assert [record["step"] for record in taken] == list(range(1, 10))
    reader = event_accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "seconds/forward"):
        table, _, column = name.rpartition("/")
        wanted = [(record["step"], (record[table] if table else record)[column]) for record in taken]
        found = [(event.step, event.value) for event in reader.Scalars(f"train/{name}")]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted], name
    assert [event.step for event in reader.Scalars("eval/loss")] == [3, 6, 9]
    assert reader.Scalars("system/cpu")

    one, two = read_run(run)["starts"]
    assert (one["world"], one["step"], two["world"], two["zero_stage"]) == (1, 0, 2, 1)
    assert two["step"] in (3, 6)
    assert "end" not in one
    assert (two["end"]["state"], two["end"]["step"]) == ("finished", 9)
    assert two["changed"] == {"resume": "auto", "system_metrics_seconds": 0.2, "gradient_accumulation_steps": 2}
    listed = list_runs(run.parent)[0]
    assert (listed["state"], listed["step"], listed["total_steps"], listed["world"]) == ("finished", 9, 9, 2)
    html = render([read(run)])
    assert "started again on 2 process(es)" in html
