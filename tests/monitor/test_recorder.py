"""run.json and system figures: each start and end of a run kept, and figures that are those of this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lumina.config import load
from lumina.monitor import Event, MetricsFile, Recorder, read_metrics
from lumina.monitor.run_json import code_version, read_run
from lumina.monitor.system import System


def measured(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "system"]


def life(folder: Path, step: int, world: int, state: str, figures: int = 0, **changes: object) -> None:
    """A start and its end, once the machine was measured so often."""
    metrics = MetricsFile(folder / "metrics.jsonl", step)
    config = load("nano", {"system_metrics_seconds": 0.05, **changes})
    recorder = Recorder(folder, config, metrics, "f" * 8, step=step, world=world, total_steps=40)
    deadline = time.monotonic() + 60
    while figures and len(measured(folder)) < figures:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    recorder.samples(step + 5, [("Hi", "Hello"), ("Bye", "“Bye”")])
    recorder.close(state, step + 10, "why")
    metrics.close()


def test_starts_and_ends_are_kept(tmp_path: Path) -> None:
    life(tmp_path, 0, 4, "failed")
    life(tmp_path, 10, 2, "finished", learning_rate=3e-4)
    run = read_run(tmp_path)
    assert run["data_fingerprint"] == "f" * 8
    assert run["config"]["learning_rate"] == 3e-4
    one, two = run["starts"]
    assert (one["step"], one["world"], one["changed"]) == (0, 4, {})
    assert (two["step"], two["world"], two["changed"]) == (10, 2, {"learning_rate": 3e-4})
    assert {name: one["end"][name] for name in ("state", "step", "reason")} == {
        "state": "failed",
        "step": 10,
        "reason": "why",
    }
    assert two["time"] >= one["end"]["time"] >= one["time"]
    assert {"torch", "deepspeed"} <= set(one["environment"]["packages"])
    answers = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in answers] == [5, 15]
    assert answers[0]["answers"][1] == {"prompt": "Bye", "answer": "“Bye”"}


def test_trackers_hear_nothing_of_a_start_that_lost_its_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="its files are what is looked at")
    config = load("nano", {"system_metrics_seconds": 0, "trackers": ["tensorboard"]})
    for owned in (True, False):
        folder = tmp_path / str(owned)
        folder.mkdir()
        metrics = MetricsFile(folder / "metrics.jsonl", 0)
        recorder = Recorder(folder, config, metrics, "f" * 8, lambda: owned, step=0, world=1, total_steps=4)  # noqa: B023
        recorder.samples(1, [("Hi", "Hello there")])
        recorder.event(Event(1, "recovery", "warn", "rule", "a reason"))
        recorder.close("stopped", 1)
        metrics.close()
    for owned in (True, False):
        told = b"".join(path.read_bytes() for path in (tmp_path / str(owned)).rglob("events.out*"))
        assert [word in told for word in (b"Hello there", b"a reason")] == [owned, owned]


def test_the_machine_is_measured_while_the_run_lives(tmp_path: Path) -> None:
    life(tmp_path, 7, 1, "finished", figures=2)
    assert {record["step"] for record in measured(tmp_path)} == {7}
    lines = (tmp_path / "metrics.jsonl").read_text()
    time.sleep(0.2)
    assert (tmp_path / "metrics.jsonl").read_text() == lines  # the thread has ended


def test_figures_are_those_of_this_machine(tmp_path: Path) -> None:
    system = System(tmp_path)
    (tmp_path / "written").write_bytes(bytes(1 << 20))
    deadline = time.process_time() + 0.2
    while time.process_time() < deadline:
        pass
    values = system.measure()
    assert values["process_cpu"] > 1
    assert values["process_memory"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert values["disk_free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert 0 <= values["cpu"] <= 100


def test_code_version_is_gits(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, or git is missing")
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert code_version()["commit"] == head.stdout.strip()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "commit" not in code_version()


def test_a_torn_run_file_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"starts": [')
    life(tmp_path, 3, 1, "stopped")
    assert [start["step"] for start in read_run(tmp_path)["starts"]] == [3]


def test_a_setting_that_has_another_name_now_is_no_change(tmp_path: Path) -> None:
    """run.json of version 0.1.0: the settings that differ from the start before are told under today's names."""
    life(tmp_path, 0, 10, "stopped")
    run = json.loads((tmp_path / "run.json").read_text())
    config = run["config"]
    del config["on_spike"], config["on_oom"]
    run["config"] = {**config, "answer_spike": "skip", "answer_out_of_memory": False}
    (tmp_path / "run.json").write_text(json.dumps(run))
    life(tmp_path, 10, 20, "stopped")
    assert read_run(tmp_path)["starts"][-1]["changed"] == {"on_oom": "halve_micro_batch"}
