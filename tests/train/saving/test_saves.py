"""What becomes of requests for a checkpoint when a start ends without one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lumina.checkpoint import RunLock
from lumina.monitor import EventLog
from lumina.train.deepspeed import Ranks, init_process_group
from lumina.train.deferred import Deferred
from lumina.train.health import Health
from lumina.train.saving.saves import Saves
from tests.train.tiny_engines import make_config


def test_a_start_that_lost_its_run_tells_whoever_it_made_wait(tmp_path: Path) -> None:
    """The start that owns the run now replies to none of the requests that this one took."""
    init_process_group()
    config, events = make_config(), EventLog(None)
    state: Any = SimpleNamespace(step=3, engine=SimpleNamespace(device=torch.device("cpu")))
    lock, ranks = RunLock(tmp_path, None, 8), Ranks(0, 1, 0, 1)
    saves = Saves(config, ranks, tmp_path, state, Deferred(), events, Health(config, events), lock, lambda what: None)
    asked = tmp_path / "requests" / "asked"
    asked.mkdir(parents=True)
    (tmp_path / "requests" / "answered").mkdir()
    (asked / "0a.json").write_text("{}")
    assert saves.flags[1], "it takes the request"
    RunLock(tmp_path, None, 8).release()
    (asked / "0b.json").write_text("{}")
    assert saves.stop_waiting(5.0)
    reply = json.loads((tmp_path / "requests" / "answered" / "0a.json").read_text())
    assert "another start of the run took it over" in reply["error"]
    assert (asked / "0b.json").exists()
