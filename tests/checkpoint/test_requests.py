"""Requests for a checkpoint, between the process that asks and the job that trains."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lumina.checkpoint import SaveReply, reply_to_save, request_save, take_save_requests
from lumina.config import UserError


def test_a_request_is_taken_once_and_replied_to(tmp_path: Path) -> None:
    taken: list[str] = []
    written = SaveReply(step=7, path="checkpoints/step-00000007", error="")

    def job() -> None:
        while not taken:
            taken.extend(take_save_requests(tmp_path))
        reply_to_save(tmp_path, taken[0], written)

    thread = threading.Thread(target=job)
    thread.start()
    assert request_save(tmp_path, timeout=60) == written
    thread.join()
    assert len(taken) == 1
    assert list((tmp_path / "requests").iterdir()) == []


def test_a_reply_that_waits_to_be_read_is_no_request(tmp_path: Path) -> None:
    (tmp_path / "requests").mkdir()
    reply_to_save(tmp_path, "save-0a", SaveReply(step=1, path="", error="disk full"))
    before = list((tmp_path / "requests").iterdir())
    assert len(before) == 1
    assert take_save_requests(tmp_path) == []
    assert list((tmp_path / "requests").iterdir()) == before


def test_nobody_trains(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing trains this run now"):
        request_save(tmp_path, timeout=0.01)
    assert list((tmp_path / "requests").iterdir()) == []


def test_an_asker_that_is_gone_hinders_nobody(tmp_path: Path) -> None:
    reply_to_save(tmp_path / "no such run", "save-0a", SaveReply(step=1, path="", error=""))
    assert take_save_requests(tmp_path / "no such run") == []
