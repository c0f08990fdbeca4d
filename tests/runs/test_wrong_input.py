"""A user's mistake: one clear message with the remedy, exit code 2, no traceback, nothing written over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from multiprocessing import util
from pathlib import Path

import pytest

from tests.runs import ROOT, Job, Runs, arguments, clean_environment, write_conversations

QUICK = {
    "max_steps": 2,
    "precision": "fp32",
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_every_n_batches": 1,
}


def refused(argv: list[str]) -> str:
    """The message of a command that must be refused."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lumina", "train", *argv],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return message + done.stderr.split(message, 1)[1]


@pytest.fixture(scope="module")
def trained(runs: Runs, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints."""
    run = tmp_path_factory.mktemp("trained") / "run"
    runs.train(arguments(run, conversations, **QUICK), 1)
    return run


def test_unknown_key(tmp_path: Path, conversations: Path) -> None:
    settings = tmp_path / "custom.yaml"
    settings.write_text("hidden_size: 64\nlearning_rat: 1e-4\n")
    message = refused(["--config", str(settings), "--train-data", str(conversations)])
    assert "learning_rat" in message
    assert "Did you mean `learning_rate`?" in message
    assert "line 2" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "data.jsonl"),
        ("", "empty"),
        ('{"messages": []}\nnot json\n{"messages": [{"role": "critic", "content": "x"}]}\n', "no"),
    ],
    ids=["missing", "empty", "all bad"],
)
def test_data(tmp_path: Path, content: str | None, says: str) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    message = refused(arguments(tmp_path / "run", data, **QUICK))
    assert "data.jsonl" in message
    assert says in message


def test_a_precision_that_a_cpu_lacks(tmp_path: Path, conversations: Path) -> None:
    message = refused(arguments(tmp_path / "run", conversations, **{**QUICK, "precision": "fp16"}))
    assert "fp16 needs a GPU" in message
    assert "--precision auto" in message


def test_a_checkpoint_of_another_shape(trained: Path, conversations: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path / "wide", conversations, **{**QUICK, "hidden_size": 64})
    for words in (["--resume", str(trained)], ["--init-from", str(trained)]):
        assert "hidden_size 32 there, 64 here" in refused([*argv, *words])


def test_other_data_than_before(trained: Path, tmp_path: Path) -> None:
    other = write_conversations(tmp_path / "other.jsonl", 20, seed=99)
    argv = arguments(trained, other, **{**QUICK, "max_steps": 4})
    assert "--experiment-name" in refused([*argv, "--resume", "auto"])


def test_a_run_that_exists(trained: Path, conversations: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(trained.rglob("*")) if path.is_file()}
    message = refused(arguments(trained, conversations, **QUICK))
    assert "already holds checkpoints" in message
    assert "--resume auto" in message
    assert {path: path.stat().st_mtime_ns for path in sorted(trained.rglob("*")) if path.is_file()} == before


def test_a_contradicting_deepspeed_configuration(tmp_path: Path, conversations: Path) -> None:
    document = tmp_path / "ds.json"
    document.write_text(json.dumps({"train_micro_batch_size_per_gpu": 7, "zero_optimization": {"stage": 1}}))
    argv = [*arguments(tmp_path / "run", conversations, **QUICK), "--ds_config", str(document)]
    message = refused(argv)
    assert "train_micro_batch_size_per_gpu" in message
    assert "batch_size" in message


# --- The exit code of one rank of several ---------------------------------------------------------


def _abort_at_teardown(rank: int) -> None:
    """What gloo's threads sometimes do while the interpreter is torn down: the process aborts."""
    util.Finalize(None, os.abort, exitpriority=10)


def _fail(rank: int) -> None:
    from lumina.train import run

    def failing(_: object) -> int:
        raise RuntimeError("a planted exception")

    _abort_at_teardown(rank)
    run.fit = failing  # type: ignore[assignment]


def test_the_exit_code_of_a_users_mistake_outlives_teardown(runs: Runs, tmp_path: Path) -> None:
    """A launcher restarts what crashed and not what the user must mend: it has only the exit code to tell by."""
    job = runs.start(arguments(tmp_path / "run", tmp_path / "missing.jsonl", **QUICK), 2, _abort_at_teardown)
    assert job.wait() == [2, 2], job.stderr()
    assert "missing.jsonl" in job.stderr()
    assert told_by(job) == [0]


def test_what_one_rank_refuses_is_told_once_a_machine(runs: Runs, conversations: Path, tmp_path: Path) -> None:
    """tests/adversary/test_ranks.py has ranks on machines of their own, each of which tells it."""
    own = [[], ["--config", str(tmp_path / "missing.yaml")]]
    job = runs.start(arguments(tmp_path / "run", conversations, **QUICK), 2, own=own)
    assert job.wait() == [2, 2], job.stderr()
    assert told_by(job) == [0]
    assert "error: rank 1 on " in job.stderr()
    assert "missing.yaml" in job.stderr()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        # Long: two ranks import torch and DeepSpeed for it, and what one rank refuses is told once a machine too.
        pytest.param(
            [["--batchsize", "3"]] * 2,
            "error: unknown option: --batchsize. Did you mean --batch-size?\n",
            marks=pytest.mark.long,
        ),
        pytest.param([[], ["--epochs", "x"]], "--epochs: invalid int value: 'x'\n", marks=pytest.mark.long),
    ],
    ids=["every rank", "rank 1"],
)
def test_a_command_line_that_ranks_refuse_is_told_once_a_machine(
    own: list[list[str]], says: str, runs: Runs, conversations: Path, tmp_path: Path
) -> None:
    job = runs.start(arguments(tmp_path / "run", conversations, **QUICK), 2, _abort_at_teardown, own=own)
    assert job.wait() == [2, 2], job.stderr()
    assert told_by(job) == [0]
    assert says in job.stderr()
    assert "  See: lumina train --help\n" in job.stderr()


def told_by(job: Job) -> list[int]:
    """The ranks that print a user's mistake, each once."""
    return [
        rank for rank, log in enumerate(job.logs) for _ in range(log.with_suffix(".err").read_text().count("error: "))
    ]


def test_the_exit_code_of_an_exception_outlives_teardown(runs: Runs, conversations: Path, tmp_path: Path) -> None:
    job = runs.start(arguments(tmp_path / "run", conversations, **QUICK), 2, _fail)
    assert job.wait() == [1, 1], job.stderr()
    assert job.stderr().count("RuntimeError: a planted exception") == 2


def test_a_global_batch_beyond_the_data_is_told(runs: Runs, conversations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.train(arguments(run, conversations, **QUICK | {"max_steps": 1, "batch_size": 8, "global_batch_size": 5000}), 1)
    assert "the global batch of 5000 samples is larger than the data, which has" in (run / "train.log").read_text()


def test_the_exit_code_of_one_rank_alone_outlives_teardown(conversations: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path / "run", conversations, **{**QUICK, "precision": "fp16"})
    script = f"import atexit, os, sys; atexit.register(os.abort); sys.argv = {['lumina', 'train', *argv]!r}"
    script += "; from lumina.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=ROOT, env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "fp16 needs a GPU" in done.stderr
