"""What becomes of requests for a checkpoint when a start ends without one, and of one that a backup fails beside."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lumina.checkpoint import RunLock, SaveJob, SaveOutcome
from lumina.monitor import EventLog
from lumina.train.deepspeed import Ranks, init_process_group
from lumina.train.deferred import Deferred
from lumina.train.health import Health
from lumina.train.saving import saves as saving
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


class Refusing:
    """A saver whose checkpoint fails once by what may pass, and each backup by what does not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tries, self.busy = folder, 0, False
        self._outcomes: list[SaveOutcome] = []

    def begin(self, job: SaveJob) -> None:
        path = self.folder / f"step-{job.snapshot.step:08d}"
        self.tries += 1
        for target in job.targets:
            if target.kind == "checkpoint" and self.tries > 1:
                path.mkdir(parents=True)
                self._outcomes.append(SaveOutcome(job, target.kind, path, 0.0))
            else:
                retry = target.kind == "checkpoint"
                self._outcomes.append(SaveOutcome(job, target.kind, None, 0.0, "planted", retry))

    def wait(self, seconds: float) -> bool:
        return True

    def outcomes(self) -> list[SaveOutcome]:
        found, self._outcomes = self._outcomes, []
        return found


def test_a_backup_that_cannot_be_written_takes_no_try_from_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = Refusing(tmp_path / "checkpoints")
    monkeypatch.setattr(saving, "Saver", lambda *given: refusing)
    init_process_group()
    config, events = make_config(backup_dir=str(tmp_path / "disk"), backup_every_n_batches=3), EventLog(None)
    snapshot = SimpleNamespace(step=3, bytes=0)
    engine = SimpleNamespace(device=torch.device("cpu"))
    state: Any = SimpleNamespace(step=2, engine=engine, snapshot=lambda copies: snapshot)
    ranks, health = Ranks(0, 1, 0, 1), Health(config, events)
    saves = Saves(config, ranks, tmp_path, state, Deferred(), events, health, None, lambda what: None)
    state.step = 3
    assert saves.finish()
    assert refusing.tries == 2
