"""Requests for a checkpoint, between the process that asks and the job that trains."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from lumina.checkpoint import RunLock, SaveReply, SaveRequests, request_save
from lumina.config import UserError

WRITTEN = SaveReply(step=7, path="checkpoints/step-00000007", error="")


def ask(run: Path, identifier: str) -> Path:
    """A request whose asker is gone: killed right after it was written."""
    path = run / "requests" / "asked" / f"{identifier}.json"
    (run / "requests" / "answered").mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    return path


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "requests").rglob("*") if path.is_file())


def test_a_request_is_taken_once_and_replied_to(tmp_path: Path) -> None:
    taken: list[str] = []
    job = SaveRequests(tmp_path)

    def train() -> None:
        while not taken:
            taken.extend(job.take())
        job.reply(taken[0], WRITTEN)

    thread = threading.Thread(target=train)
    thread.start()
    assert request_save(tmp_path, timeout=60) == WRITTEN
    thread.join()
    assert len(taken) == 1
    assert files(tmp_path) == []


def test_one_request_is_one_checkpoint_whatever_becomes_of_its_asker(tmp_path: Path) -> None:
    """A reply that nobody fetches must not be taken for a request, neither by this start of the run nor by the next."""
    ask(tmp_path, "0a")
    job = SaveRequests(tmp_path)
    assert job.take() == ["0a"]
    job.reply("0a", WRITTEN)
    assert [job.take() for _ in range(5)] == [[]] * 5
    assert SaveRequests(tmp_path).take() == []


def test_a_request_that_cannot_be_removed_is_handled_once(tmp_path: Path) -> None:
    """NFS shows removed files for a while, and the folder may be another account's."""
    asked = ask(tmp_path, "0a")
    job = SaveRequests(tmp_path)
    with mock.patch.object(Path, "unlink", side_effect=PermissionError):
        assert job.take() == ["0a"]
        assert job.take() == []
        job.reply("0a", WRITTEN)
        assert SaveRequests(tmp_path).take() == [], "the next start of the run takes the same request again"
    assert asked.exists()


def test_a_request_that_a_killed_start_had_taken_is_the_next_ones(tmp_path: Path) -> None:
    """Its asker waits as long as the run is trained, and the request's own file is gone."""
    first = RunLock(tmp_path, "job", 8)
    begun: list[str] = []

    def take_and_restart() -> None:
        begun.extend(SaveRequests(tmp_path).take())
        first.release()  # killed; its launcher starts it again
        RunLock(tmp_path, "job", 8)
        job = SaveRequests(tmp_path)
        for request in job.take():
            job.reply(request, WRITTEN)
        assert job.take() == []

    thread = when_asked(tmp_path, take_and_restart)
    assert request_save(tmp_path, timeout=120) == WRITTEN
    thread.join()
    assert len(begun) == 1
    assert not list((tmp_path / "requests").rglob("*.*"))


def test_a_disk_that_takes_no_record_still_means_once_a_start(tmp_path: Path) -> None:
    asked = ask(tmp_path, "0a")
    (tmp_path / "requests" / "answered").rmdir()
    job = SaveRequests(tmp_path)
    with mock.patch.object(Path, "unlink", side_effect=OSError):
        assert [job.take(), job.take()] == [["0a"], []]
    assert asked.exists()


def test_nobody_trains(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing trains this run now"):
        request_save(tmp_path, timeout=0.01)
    assert files(tmp_path) == []


def test_the_asker_is_told_that_the_job_has_taken_it(tmp_path: Path) -> None:
    """Also where the request's file is still to be seen."""
    job = SaveRequests(tmp_path)
    taken: list[str] = []

    def train() -> None:
        while not taken:
            taken.extend(job.take())
            for identifier in taken:
                ask(tmp_path, identifier)

    thread = threading.Thread(target=train)
    thread.start()
    with pytest.raises(UserError, match="the job is still saving"):
        request_save(tmp_path, timeout=2)
    thread.join()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "requests").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        request_save(tmp_path, timeout=1)


def test_an_asker_that_is_gone_hinders_nobody(tmp_path: Path) -> None:
    job = SaveRequests(tmp_path / "no such run")
    job.reply("0a", WRITTEN)
    assert job.take() == []


def test_what_nobody_fetches_is_removed_after_a_day(tmp_path: Path) -> None:
    ask(tmp_path, "0a")
    job = SaveRequests(tmp_path)
    job.reply(job.take()[0], WRITTEN)
    left = tmp_path / "requests" / "answered"
    assert json.loads((left / "0a.json").read_text()) == WRITTEN
    SaveRequests(tmp_path)
    assert sorted(path.name for path in left.iterdir()) == ["0a.json", "0a.taken"]
    for path in left.iterdir():
        os.utime(path, (0, 0))
    SaveRequests(tmp_path)
    assert list(left.iterdir()) == []


def test_a_job_that_ends_tells_every_asker(tmp_path: Path) -> None:
    """Also one whose request it had not taken yet."""
    job, ended = SaveRequests(tmp_path), SaveReply(step=7, path="", error="the run ended")
    ask(tmp_path, "0a")
    job.take()
    ask(tmp_path, "0b")
    ask(tmp_path, "0c")
    job.take()
    job.reply("0c", WRITTEN)
    ask(tmp_path, "0d")
    job.close(ended)
    replies = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "requests" / "answered").glob("*.json")}
    assert replies == {"0a": ended, "0b": ended, "0c": WRITTEN, "0d": ended}


def test_a_start_that_lost_its_run_replies_to_what_it_has_taken(tmp_path: Path) -> None:
    """And leaves the others to the start that goes on."""
    job, lost = SaveRequests(tmp_path), SaveReply(step=7, path="", error="another start")
    ask(tmp_path, "0a")
    job.take()
    ask(tmp_path, "0b")
    job.close(lost, lost=True)
    assert json.loads((tmp_path / "requests" / "answered" / "0a.json").read_text()) == lost
    assert SaveRequests(tmp_path).take() == ["0b"]


def when_asked(run: Path, act: Callable[[], object]) -> threading.Thread:
    """Does something once a request is there: by then its asker has seen whether the run is trained."""

    def wait() -> None:
        while not list(run.glob("requests/asked/*.json")):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_the_job_is_killed_meanwhile(tmp_path: Path) -> None:
    """It says nothing: the asker sees that the owner of the run is gone, on its own machine within seconds."""
    thread = when_asked(tmp_path, RunLock(tmp_path, None, 8).release)
    with pytest.raises(UserError, match="this start of the run has ended"):
        request_save(tmp_path, timeout=120, patience=60)
    thread.join()
    assert files(tmp_path) == []


@pytest.mark.parametrize("job", [None, "job"], ids=["its reply is not seen yet", "its launcher starts it again"])
def test_a_job_that_seems_to_be_gone_may_still_reply(job: str | None, tmp_path: Path) -> None:
    lock = RunLock(tmp_path, job, 8)
    if job is None:  # on another machine: a network file system shows that the lock was released, and then the reply
        (tmp_path / ".owner.json").write_text(json.dumps({"token": lock.token, "machine": "far 1", "job": None}))

    def end_and_reply() -> None:
        lock.release()
        time.sleep(3.5)  # the asker has seen it three times
        if job is not None:
            RunLock(tmp_path, job, 8)
        for request in (requests := SaveRequests(tmp_path)).take():
            requests.reply(request, WRITTEN)

    thread = when_asked(tmp_path, end_and_reply)
    assert request_save(tmp_path, timeout=120, patience=60) == WRITTEN
    thread.join()


def test_a_file_system_that_stumbles_says_nothing_of_the_job(tmp_path: Path) -> None:
    """The heartbeat of a start elsewhere goes on, but no file can be made to read the file system's clock."""
    lock = RunLock(tmp_path, None, 8)
    (tmp_path / ".owner.json").write_text(json.dumps({"token": lock.token, "machine": "far 1", "job": None}))

    def stumble() -> None:
        with mock.patch.object(Path, "touch", side_effect=OSError(errno.EDQUOT, "Disk quota exceeded")):
            time.sleep(2.5)
        for request in (requests := SaveRequests(tmp_path)).take():
            requests.reply(request, WRITTEN)
        lock.release()  # after the reply: released for half a second, it would be gone

    thread = when_asked(tmp_path, stumble)
    assert request_save(tmp_path, timeout=120, patience=0.5) == WRITTEN
    thread.join()
