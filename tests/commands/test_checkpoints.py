"""`lumina checkpoints` on a real run with backups."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tests.runs as real
from lumina import checkpoint
from lumina.cli import main
from lumina.monitor.events import read_events
from tests.runs import ROOT, Runs, arguments, clean_environment, differing

pytestmark = pytest.mark.timeout(900)

SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 2,
    "global_batch_size": 4,
    "save_every_n_batches": 2,
    "backup_every_n_batches": 2,
    "backup_keep_last": 2,
    "backup_keep_every": 4,
    "keep_last": 2,
}


@pytest.fixture(scope="module")
def trained(runs: Runs, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with backups beside it, saved synchronously so that no save is put off."""
    folder = tmp_path_factory.mktemp("commands")
    settings = {**SETTINGS, "max_steps": 9, "backup_dir": folder / "disk", "save_async": False}
    runs.train(arguments(folder / "runs" / "run", conversations, stage=2, **settings), 2)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(trained / "runs" / "run", tmp_path / "run")
    shutil.copytree(trained / "disk", tmp_path / "disk")
    written = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(written.replace(str(trained / "disk"), str(tmp_path / "disk")))
    return tmp_path / "run"


def names(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder)]


def lumina(*words: object) -> int:
    return main(["checkpoints", *map(str, words)])


def test_backups_are_kept_by_their_own_rule_and_equal_the_checkpoints(run: Path) -> None:
    backups = run.parent / "disk" / "run"
    assert names(run / "checkpoints") == [9, 8]
    assert names(backups) == [8, 6, 4]
    assert all(checkpoint.integrity_error(path) is None for path in checkpoint.list_checkpoints(backups))
    one, other = (real.state(folder / checkpoint.name_of(8)) for folder in (run / "checkpoints", backups))
    assert differing(one, other) == []
    places = [event["rule"] for event in read_events(run / "events.jsonl") if event["kind"] == "save"]
    assert places.count("backup") == 4


def test_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lumina("list", run) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["9", "checkpoint"], ["8", "checkpoint"], ["8", "backup"], ["6", "backup"], ["4", "backup"]]


def test_list_and_prune_load_no_torch(run: Path) -> None:
    code = (
        "import sys; from lumina.cli import main; main(sys.argv[1:]); "
        "raise SystemExit(any(name.split('.')[0] == 'torch' for name in sys.modules))"
    )
    for words in (["list", str(run)], ["prune", str(run), "--keep-last", "1"]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, "checkpoints", *words],
            cwd=ROOT,
            env=clean_environment(),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_verify_and_restore(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lumina("verify", run) == 0
    weights = run / "checkpoints" / checkpoint.name_of(8) / "rank-00001-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert lumina("verify", run) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "DAMAGED" in line]
    assert line.startswith("checkpoint step-00000008: DAMAGED: rank-00001")

    assert lumina("restore", run) == 0
    assert checkpoint.integrity_error(run / "checkpoints" / checkpoint.name_of(8)) is None
    assert "--resume auto would take the newer step-00000009" in capsys.readouterr().out
    assert lumina("restore", run, "--step", 4) == 0
    assert names(run / "checkpoints") == [9, 8, 4]
    assert lumina("restore", run, "--step", 4) == 0
    assert "nothing to restore" in capsys.readouterr().out
    assert lumina("restore", run, "--step", 5) == 2
    assert not list((run / "checkpoints").glob(".*"))


def test_a_damaged_backup_is_not_restored(run: Path) -> None:
    newest = run.parent / "disk" / "run" / checkpoint.name_of(8)
    (newest / checkpoint.TRAINER).write_text("{}")
    shutil.rmtree(run / "checkpoints" / checkpoint.name_of(8))
    assert lumina("restore", run) == 0
    assert names(run / "checkpoints") == [9, 6]
    assert lumina("restore", run, "--step", 8) == 2


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lumina("prune", run, "--backups", "--keep-last", 1, "--dry-run") == 0
    assert capsys.readouterr().out.count("would remove") == 2
    assert lumina("prune", run, "--backups", "--keep-last", 1, "--keep-every", 4) == 0
    assert names(run.parent / "disk" / "run") == [8, 4]
    assert lumina("prune", run, "--keep-last", 0) == 2
    (run / "checkpoints" / checkpoint.name_of(9) / checkpoint.TRAINER).write_text("{}")
    assert lumina("prune", run, "--keep-last", 1) == 2
    assert names(run / "checkpoints") == [9, 8], "the only whole one is not removed"


def test_no_run(tmp_path: Path) -> None:
    assert lumina("list", tmp_path) == 2


def test_save_asks_a_running_job(
    runs: Runs, conversations: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "run"
    settings = {"precision": "fp32", "batch_size": 2, "global_batch_size": 4, "save_every_n_batches": 10_000}
    settings |= {"max_steps": 1_000_000, "epochs": 100_000}  # the run is still there when it is asked
    job = runs.start(arguments(run, conversations, stage=2, **settings), 2)
    job.wait_for_step(2)
    assert lumina("save", run, "--timeout", 120) == 0
    (saved,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert str(saved) in capsys.readouterr().out
    assert checkpoint.integrity_error(saved) is None
    job.signal(signal.SIGTERM)
    assert job.wait() == [75, 75]
    assert lumina("save", run, "--timeout", 0.5) == 2
    assert not [path for path in (run / "requests").rglob("*") if path.is_file()]
