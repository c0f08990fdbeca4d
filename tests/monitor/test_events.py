"""events.jsonl: whole lines whatever happened to the file, and never an error for the run."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from lumina.monitor.events import EventLog, read_events


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.add(7, "recovery", "warn", "loss-spike", "20 times the median", "update skipped", samples=[3, 1], norm=math.inf)
    EventLog(tmp_path / "events.jsonl").add(8, "run", "info", "start", "resumed")
    first, second = read_events(tmp_path / "events.jsonl")
    assert isinstance(first.pop("time"), float)
    assert first == {
        "step": 7,
        "kind": "recovery",
        "level": "warn",
        "rule": "loss-spike",
        "reason": "20 times the median",
        "action": "update skipped",
        "samples": [3, 1],
        "values": {"norm": None},
    }
    assert (second["step"], second["action"], "samples" in second) == (8, "", False)


def test_a_line_cut_short_by_a_kill_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for step in (1, 2):
        log.add(step, "run", "info", "start", "x")
    path.write_text(path.read_text()[:-20])
    log.add(3, "run", "info", "start", "x")
    assert [event["step"] for event in read_events(path)] == [1, 3]


def test_a_disk_that_refuses_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(tmp_path / "missing" / "events.jsonl")
    with caplog.at_level(logging.WARNING, "lumina"):
        for step in (1, 2):
            log.add(step, "run", "info", "start", "x")
    assert len(caplog.records) == 1


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    event = EventLog(None).add(1, "health", "warn", "plateau", "flat")
    assert (event.rule, event.level) == ("plateau", "warn")
    assert list(read_events(tmp_path / "events.jsonl")) == []
