"""Episodes: what the console says, and what goes to the log and the event log, once."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from lumina.monitor.events import EventLog, read_events
from lumina.train.health import Health, StepObservation
from tests.train.tiny_engines import make_config


def make(tmp_path: Path, window: int = 100, **changes: object) -> Health:
    return Health(make_config(health_check_interval=window, **changes), EventLog(tmp_path / "events.jsonl"))


def see(health: Health, step: int, loss: float = 2.0, applied: bool = True) -> str:
    return str(health.step(StepObservation(step, loss, 1.0 if applied else math.nan, applied, seconds=1.0)))


def test_ok(tmp_path: Path) -> None:
    health = make(tmp_path)
    assert [see(health, step) for step in (1, 2, 3)] == ["OK"] * 3
    assert list(read_events(tmp_path / "events.jsonl")) == []


def test_a_skipped_update_warns_for_the_window(tmp_path: Path) -> None:
    health = make(tmp_path, 3)
    assert see(health, 1) == "OK"
    warning = "WARN(update of step 2 skipped: gradient not finite)"
    assert see(health, 2, applied=False) == warning
    assert [see(health, step) for step in (3, 4, 5)] == [warning, warning, "OK"]


def test_an_episode_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two findings within the interval are one episode: one line in the log, its beginning and end in the event log."""
    health = make(tmp_path, 3)
    with caplog.at_level(logging.WARNING, "lumina"):
        for step in range(1, 20):
            see(health, step, applied=step not in (5, 7, 15))
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == ["step 5", "step 15"]
    told = [(e["step"], e["level"], e["reason"][:16]) for e in read_events(tmp_path / "events.jsonl")]
    assert told == [
        (5, "warn", "update of step 5"),
        (10, "info", "over"),
        (15, "warn", "update of step 15"[:16]),
        (18, "info", "over"),
    ]


def test_three_in_a_row_are_critical(tmp_path: Path) -> None:
    health = make(tmp_path, 2)
    found = [see(health, step, applied=False) for step in (5, 6, 7, 8)]
    assert [text.split("(")[0] for text in found] == ["WARN", "WARN", "CRIT", "CRIT"]
    assert found[2:] == ["CRIT(3 updates skipped in a row)", "CRIT(4 updates skipped in a row)"]
    # One good update ends the row; the warning about the last skipped one stays for its window.
    assert see(health, 9) == "WARN(update of step 8 skipped: gradient not finite)"
    assert see(health, 10) == "OK"
    assert see(health, 11, applied=False).startswith("WARN(update of step 11")


def test_a_loss_that_is_not_finite_is_critical_while_it_lasts(tmp_path: Path) -> None:
    health = make(tmp_path)
    for step, loss in enumerate((math.nan, math.inf, -math.inf), 1):
        assert see(health, step, loss) == "CRIT(loss is not finite)"
    assert see(health, 4) == "OK"
    assert see(health, 5, math.nan, applied=False) == "CRIT(loss is not finite)"
    assert see(health, 6).startswith("WARN(update of step 5")


def test_what_others_report(tmp_path: Path) -> None:
    health = make(tmp_path, 3)
    see(health, 1)
    health.report("save-failed", "warn", "disk full", lasting=True)
    assert [see(health, step) for step in range(2, 9)] == ["WARN(disk full)"] * 7
    health.clear("save-failed")
    assert see(health, 9) == "OK"
    health.report("corrupt-sample", "warn", "sample 3")
    assert [see(health, step) for step in (10, 11, 12)] == ["WARN(sample 3)"] * 2 + ["OK"]


def test_a_rule_can_be_switched_off(tmp_path: Path) -> None:
    health = make(tmp_path, disabled_rules=["not-finite"])
    assert see(health, 1, applied=False) == "OK"
    with pytest.raises(ValueError, match=r"no such health rule: not-finit\. Did you mean not-finite\?"):
        make(tmp_path, disabled_rules=["not-finit"])
