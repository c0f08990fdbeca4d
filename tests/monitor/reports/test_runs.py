"""`lumina runs`: states told apart by what is alive, best evaluations, order by age."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lumina import cli
from lumina.monitor.reports.runs import best_evaluation, last_record, list_runs, span
from tests.monitor.recorded import record_run


def begun(folder: Path, **changes: Any) -> None:
    """The run's last start as this machine's newest, not ended, with changes."""
    told = json.loads((folder / "run.json").read_text())
    start = told["starts"][-1]
    start.pop("end", None)
    start |= {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **changes}
    (folder / "run.json").write_text(json.dumps(told))


def states(folder: Path) -> dict[str, str]:
    return {run["name"]: run["state"] for run in list_runs(folder)}


def test_states(tmp_path: Path) -> None:
    for name in ("alive", "killed", "finished", "failed", "elsewhere", "lost", "reused", "older"):
        record_run(tmp_path / name, 20, starts=1)
    begun(tmp_path / "alive")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    begun(tmp_path / "killed", pid=ended.pid)
    for state in ("finished", "failed"):
        begun(tmp_path / state, end={"time": time.time(), "state": state, "step": 20, "reason": ""})
    begun(tmp_path / "elsewhere", host="another")
    begun(tmp_path / "lost", host="another")
    long_ago = time.time() - 3600
    for file in (tmp_path / "lost").iterdir():
        os.utime(file, (long_ago, long_ago))
    # A process that is younger than the start is another one with its number.
    begun(tmp_path / "reused", time=psutil.Process().create_time() - 10)
    (tmp_path / "older" / "run.json").unlink()
    assert states(tmp_path) == {
        "alive": "running",
        "killed": "stale",
        "finished": "finished",
        "failed": "failed",
        "elsewhere": "running",
        "lost": "stale",
        "reused": "stale",
        "older": "unknown",
    }
    assert list_runs(tmp_path)[-1]["name"] == "lost"  # the one that wrote longest ago


def test_what_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "run", 40)
    (tmp_path / "not a run").mkdir()
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    evaluated = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = min((r["loss"], r["step"]) for r in evaluated if r["kind"] == "eval")
    assert (run["best_eval"], run["best_step"]) == best
    assert (run["step"], run["total_steps"], run["world"]) == (40, 40, 2)
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "40/40" in capsys.readouterr().out
    assert cli.main(["runs", str(tmp_path / "nothing")]) == 2


def test_torn_files(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "eval", "step": 2, "loss": null}\n{"kind": "step", "step": 3}\n{"kind": "eval", "st')
    assert last_record(path) == {"kind": "step", "step": 3}
    assert best_evaluation(path) is None
    path.write_text("")
    assert last_record(path) == {}


def test_spans() -> None:
    assert [span(seconds) for seconds in (5, 65, 7300, 200_000)] == ["5 s", "1 min", "2 h", "2 d"]
