"""Trackers read back with their own libraries: metrics.jsonl's values, no step twice, whatever was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lumina.monitor import MetricsFile, read_metrics
from lumina.monitor.tracking import RunInfo, Trackers, scalars

pytest.importorskip("wandb")
pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")

# One start of a run: goes on from a step, records the next ones, and ends or is killed.
START = """
import math, os, signal, sys, time
from pathlib import Path
from lumina.monitor import MetricsFile
from lumina.monitor.tracking import RunInfo, Trackers

folder, begin, end, killed, names = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5].split(",")
metrics = MetricsFile(folder / "metrics.jsonl", begin)
trackers = Trackers(names, RunInfo(folder, "tested", {"learning_rate": 1e-4}, begin))
metrics.listeners.append(trackers.record)
for step in range(begin + 1, end + 1):
    loss = math.nan if step == 5 else 3 / step
    metrics.write("step", step, {"loss": loss, "lr": 1e-4 * step, "health": "OK", "seconds": {"data": 0.5 / step},
                                 "time": 1.7e9 + step})
    if step % 4 == 0:
        metrics.evaluation(step, 2 / step, math.exp(2 / step), 0.5)
if killed:
    while killed > 1 and not all(feed._queue.empty() for feed in trackers._feeds):
        time.sleep(0.05)
    if killed > 1:  # once, before the trackers' libraries are imported
        time.sleep(0.1)
    os.kill(os.getpid(), 9)
trackers.close()
metrics.close()
"""
# A process with a run of its own beside Lumina's, or none, in which Lumina's is abandoned. It then uses wandb further,
# and has a last run of Lumina's, which is abandoned too when wandb's process has no other.
NOTEBOOK = """
import sys
from pathlib import Path
from unittest.mock import patch
import psutil, wandb
from lumina.monitor.tracking import RunInfo
from lumina.monitor.trackers.wandb import Wandb

def served():
    return {one.pid for one in psutil.Process().children(True)
            if one.name().startswith("wandb-") and one.status() != psutil.STATUS_ZOMBIE}

def ended(began):
    psutil.wait_procs([psutil.Process(pid) for pid in began if psutil.pid_exists(pid)], 5)
    return not served() & began

folder, own, tracker = Path(sys.argv[1]), sys.argv[2], Wandb()
mine = wandb.init(dir=folder, project="p", id="mine", reinit="create_new") if own == "before" else None
with patch("wandb.sdk.lib.ipython.in_notebook", lambda: True):
    tracker.open(RunInfo(folder, "tested", {}, 0))
if own == "after":
    mine = wandb.init(dir=folder, project="p", id="mine", reinit="create_new")
began = served()
assert began
tracker.abandon()
if own == "none":
    assert ended(began), served()
    mine = wandb.init(dir=folder, project="p", id="mine")
else:
    assert served() >= began
    tracker.close()
mine.log({"a": 1})
mine.finish()
last = Wandb()
last.open(RunInfo(folder, "last", {}, 0))
began = served()
last.abandon()
assert ended(began), served()
"""
NAMES = ("wandb", "tensorboard", "mlflow")
CURVES = {("train", "loss"), ("train", "lr"), ("train", "seconds/data"), ("eval", "loss"), ("eval", "ppl")}
Points = dict[tuple[str, str], list[tuple[int, float]]]


@pytest.mark.parametrize("own", ["before", *(pytest.param(one, marks=pytest.mark.long) for one in ("none", "after"))])
def test_wandb_goes_on_for_the_runs_of_a_notebook(own: str, tmp_path: Path) -> None:
    """Only a service that is the abandoned run's alone is ended, and the next run has another."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(tmp_path), own],
        env={**without_trackers(), "WANDB_MODE": "offline"}, capture_output=True, text=True, timeout=280, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    from lumina.monitor.trackers.wandb import offline_rows

    assert [row["a"] for row in offline_rows(tmp_path, "mine") if "a" in row] == [1]


def test_without_its_library_there_is_nothing_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from lumina.monitor.trackers.wandb import Wandb

    monkeypatch.setitem(sys.modules, "wandb", None)
    Wandb().abandon()


def without_trackers() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}


def start(
    folder: Path, begin: int, end: int, killed: int = 0, names: tuple[str, ...] = NAMES, **changes: str
) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", START, str(folder), str(begin), str(end), str(killed), ",".join(names)]
    return subprocess.run(
        argv,
        env={**without_trackers(), "WANDB_MODE": "offline", **changes},
        capture_output=True,
        text=True,
        check=False,
    )


def truth(folder: Path) -> Points:
    points: Points = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        group = {"step": "train", "eval": "eval"}[record["kind"]]
        for name, value in scalars(record):
            points.setdefault((group, name), []).append((record["step"], value))
    return {curve: points[curve] for curve in CURVES}


def from_wandb(folder: Path) -> Points:
    from lumina.monitor.trackers.wandb import offline_rows

    points: Points = {}
    for row in offline_rows(folder, (folder / "wandb-run").read_text()):
        for group, name in CURVES:
            if f"{group}/{name}" in row:
                points.setdefault((group, name), []).append((row[f"{group}/step"], row[f"{group}/{name}"]))
    return points


def from_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        (group, name): [(event.step, event.value) for event in reader.Scalars(f"{group}/{name}")]
        for group, name in CURVES
    }


def from_mlflow(folder: Path) -> Points:
    from mlflow.tracking import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    run = (folder / "mlflow-run").read_text()
    return {
        (group, name): [(point.step, point.value) for point in client.get_metric_history(run, f"{group}/{name}")]
        for group, name in CURVES
    }


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed three times: late, at once (before anything was sent), and late again; each resumed from before."""
    folder = tmp_path_factory.mktemp("followed")
    for begin, end, killed in ((0, 17, 2), (12, 30, 1), (24, 41, 2)):
        assert start(folder, begin, end, killed).returncode == -signal.SIGKILL
    done = start(folder, 36, 50)
    assert done.returncode == 0, done.stderr
    assert "no longer followed" not in done.stderr
    return folder


@pytest.mark.long
@pytest.mark.parametrize("read", [from_wandb, from_tensorboard, from_mlflow])
def test_the_trackers_have_what_metrics_have_after_three_resumes(followed: Path, read: Any) -> None:
    wanted, found = truth(followed), read(followed)
    steps = [step for step, _ in wanted["train", "lr"]]
    assert steps == list(range(1, 51))
    assert [step for step, _ in wanted["train", "loss"]] == [step for step in steps if step != 5]  # NaN is no figure
    for curve, points in wanted.items():
        assert max(Counter(step for step, _ in found[curve]).values()) == 1, curve
        near = [(step, pytest.approx(value, rel=1e-6)) for step, value in points]  # TensorBoard keeps float32
        assert sorted(found[curve]) == near, curve


@pytest.mark.long
def test_wandb_goes_on_with_the_same_run(followed: Path) -> None:
    files = list((followed / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 3  # the second start was killed before wandb had begun
    assert {path.name for path in files} == {f"run-{(followed / 'wandb-run').read_text()}.wandb"}


def test_the_ids_that_a_job_gives_are_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    number = client.create_run("0").info.run_id
    ids = {"WANDB_RUN_ID": "of-my-job", "MLFLOW_RUN_ID": number}
    for begin, end in ((0, 4), (4, 8)):
        done = start(tmp_path, begin, end, names=("wandb", "mlflow"), **ids)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")} == {"run-of-my-job.wandb"}
    found = {point.step for point in client.get_metric_history(number, "train/loss")}
    assert found == {step for step, _ in truth(tmp_path)["train", "loss"]}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.long
def test_a_service_that_cannot_be_reached_stops_nothing(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{closed_port()}"
    done = start(
        tmp_path, 0, 8, names=("wandb",), WANDB_MODE="online", WANDB_BASE_URL=nobody, WANDB_API_KEY="0" * 40,
        LUMINA_WANDB_PATIENCE="3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "send it later with `wandb sync`" in done.stderr
    assert from_wandb(tmp_path)["train", "lr"] == truth(tmp_path)["train", "lr"]


def test_a_tracker_that_fails_is_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    trackers = Trackers(["tensorboard"], RunInfo(tmp_path, "name", {}, 0))
    metrics.listeners.append(trackers.record)
    metrics.evaluation(3, 1.0, 2.7, 0.1)
    trackers.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3]
    assert "tensorboard is no longer followed, the run goes on" in caplog.text


def test_tensorboard_takes_back_what_a_rollback_takes_back(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], RunInfo(tmp_path, "name", {}, 0))
    for first, last, loss in ((1, 9, 1.0), (5, 12, 2.0)):
        if first > 1:
            trackers.rewind(first - 1)
        for step in range(first, last + 1):
            trackers.record({"kind": "step", "step": step, "loss": loss, "time": None})
    trackers.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    points = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert points == [(step, 1.0 if step < 5 else 2.0) for step in range(1, 13)]


def test_figures_of_a_record() -> None:
    record = {"kind": "step", "step": 3, "time": 1.0, "loss": None, "lr": 0.5, "health": "OK", "seconds": {"data": 2}}
    assert dict(scalars(record)) == {"lr": 0.5, "seconds/data": 2.0}


class Flaky:
    """A service that fails and hangs when it is told to."""

    def __init__(self, failures: int = 0, hang: threading.Event | None = None) -> None:
        self.failures, self.hang = failures, hang
        self.taken: list[int] = []
        self.abandoned = self.closed = False

    def open(self, run: RunInfo) -> dict[str, int]:
        return {}

    def scalars(self, group: str, step: int, values: Mapping[str, float], time: float | None) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("away")
        self.taken.append(step)

    def text(self, name: str, step: int, text: str) -> None: ...

    def rewind(self, step: int) -> bool:
        return False

    def close(self) -> None:
        self.closed = True
        if self.hang is not None:
            self.hang.wait()

    def abandon(self) -> None:
        self.abandoned = True


def follow(folder: Path, service: Flaky, closing: float = 60.0) -> None:
    run = RunInfo(folder, "name", {}, 0)
    trackers = Trackers(["flaky"], run, make=lambda name: service, pause=0.01, closing=closing)
    for step in (1, 2, 3):
        trackers.record({"kind": "step", "step": step, "loss": 1.0})
    while service.failures and trackers._feeds[0].failed is None:
        time.sleep(0.01)
    trackers.close()


def test_a_service_that_comes_back_misses_nothing(tmp_path: Path) -> None:
    service = Flaky(failures=3)
    follow(tmp_path, service)
    assert service.taken == [1, 2, 3]


def test_a_service_that_stays_away_is_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    follow(tmp_path, Flaky(failures=100))
    assert "no longer followed, the run goes on: ConnectionError: away" in caplog.text


def test_a_service_that_hangs_does_not_hold_up_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hang = threading.Event()
    service = Flaky(hang=hang)
    follow(tmp_path, service, closing=0.5)  # returns
    assert service.abandoned
    assert "had not sent everything" in caplog.text
    hang.set()
    for thread in threading.enumerate():  # the next test looks for such threads
        if thread.name == "lumina-flaky":
            thread.join(60)


def test_a_start_that_lost_its_run_leaves_its_trackers_as_they_are(tmp_path: Path) -> None:
    """Nothing of them goes on in a process that does, such as a notebook's."""
    service = Flaky()
    trackers = Trackers(["flaky"], RunInfo(tmp_path, "name", {}, 0), make=lambda name: service)
    trackers.record({"kind": "step", "step": 1, "loss": 1.0})
    trackers.abandon()
    assert (service.taken, service.abandoned, service.closed) == ([1], True, False)
    assert "lumina-flaky" not in {thread.name for thread in threading.enumerate()}
