"""What a run leaves, killed and resumed, with a tracker out of reach, or profiled: one curve in metrics.jsonl and in
TensorBoard, every start in run.json, a trace and a table of the most expensive operations."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lumina.monitor import read_metrics
from lumina.monitor.reports.html import render
from lumina.monitor.reports.run_data import read
from lumina.monitor.reports.runs import list_runs
from lumina.monitor.run_json import read_run
from tests.runs import Runs, arguments, held_at, steps, write_conversations

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
    first = runs.start(argv, patch=partial(held_at, 8))
    first.wait_for_step(5)
    first.wait_for_checkpoint()
    first.kill()
    assert list_runs(run.parent)[0]["state"] == "stale"
    again = [*argv, "--resume", "auto", "--set", "system_metrics_seconds=0.2"]
    assert runs.start(again, 2, patch=_other_memory).wait() == [0, 0]

    taken = steps(run)
    assert [record["step"] for record in taken] == list(range(1, 10))
    memory = {(record["memory"], record["memory_total"]) for record in taken[-3:]}
    assert memory == {(2 * 10**9, 4 * 10**10)}, "of the rank that has the most in use"
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


def _other_memory(rank: int) -> None:
    """Each rank has another amount in use, and of another amount."""
    from lumina.train import step

    step.used_memory = lambda device: ((rank + 1) * 10**9, (5 - rank) * 10**10)


def _out_of_reach(rank: int) -> None:
    """wandb is to be online, and nobody listens where its service should be."""
    os.environ |= {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "0" * 40,
        "LUMINA_WANDB_PATIENCE": "1",
    }


@pytest.mark.long
def test_wandb_out_of_reach(runs: Runs, tmp_path: Path) -> None:
    """The run ends well with its metrics whole, and what wandb was to have is in its folder, to be sent later."""
    pytest.importorskip("wandb")
    from lumina.monitor.trackers.wandb import offline_rows

    data = write_conversations(tmp_path / "train.jsonl", 40, seed=1)
    run = tmp_path / "experiments" / "run"
    settings = {"max_steps": 4, "eval_every_n_batches": 2, "eval_fraction": 0.1, "save_every_n_batches": 100}
    job = runs.start([*arguments(run, data, **settings), "--tracker", "wandb"], patch=_out_of_reach)
    assert job.wait() == [0], job.stderr()
    assert "send it later with `wandb sync`" in job.stderr()
    assert read_run(run)["starts"][0]["end"]["state"] == "finished"

    assert [record["step"] for record in steps(run)] == [1, 2, 3, 4]
    evaluations = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"]
    assert [record["step"] for record in evaluations] == [2, 4]
    rows = list(offline_rows(run, (run / "wandb-run").read_text()))
    sent = [(row["train/step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert sent == [(record["step"], record["loss"]) for record in steps(run)]
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == [record["loss"] for record in evaluations]


def test_profile(runs: Runs, tmp_path: Path) -> None:
    """The trace is what Perfetto reads, and of three steps; the table's operations are in it, the longest first."""
    data = write_conversations(tmp_path / "train.jsonl", 40, seed=1)
    run = tmp_path / "experiments" / "run"
    runs.train([*arguments(run, data, max_steps=7, save_every_n_batches=100), "--profile"])

    (trace,) = (run / "profile").glob("*.trace.json.gz")
    assert trace.name == "step-00000006.trace.json.gz"
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    durations: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation"):
            durations[event["name"]] = durations.get(event["name"], 0.0) + event["dur"] / 1000  # µs to ms
            calls[event["name"]] = calls.get(event["name"], 0) + 1
    assert sum(name.startswith("ProfilerStep#") for name in calls) == 3

    head, *rows = (run / "profile" / "step-00000006.txt").read_text().splitlines()
    assert head.split() == ["operation", "calls", "ms", "share"]
    table = [(row[:56].strip(), *row[56:].split()) for row in rows]
    assert len({name for name, *_ in table}) == 10
    spent = [float(ms) for _, _, ms, _ in table]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] > 0
    for name, count, ms, _ in table:
        found = [known for known in calls if known[:56].strip() == name]
        assert 0 < int(count) <= sum(calls[known] for known in found), name  # the table counts nested repeats once
        assert float(ms) <= sum(durations[known] for known in found) + 0.01, name  # in itself: never above the whole
