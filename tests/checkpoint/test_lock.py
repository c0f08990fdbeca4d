"""The newest start owns a run, but none takes it from one that lives; only its own launch goes on by itself."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lumina.checkpoint import lock as lock_module
from lumina.checkpoint.lock import NAME, RunLock, in_training, last_global_batch, refuse_owned
from lumina.config import UserError
from tests.runs import clean_environment

HOLDER = """
import sys, time
from pathlib import Path
from lumina.checkpoint import RunLock
lock = RunLock(Path(sys.argv[1]), sys.argv[2] or None, 8)
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


def holder(folder: Path, launch: str = "") -> subprocess.Popen[str]:
    """A process that holds the lock of a run until it is told to end."""
    command = [sys.executable, "-P", "-c", HOLDER, str(folder), launch]
    process = subprocess.Popen(
        command,
        env=clean_environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def elsewhere(folder: Path, **facts: Any) -> Path:
    """A lock that a start on another machine holds; returns its heartbeat's file."""
    folder.mkdir(exist_ok=True)
    record = {"token": "0a", "job": "other", "host": "far", "machine": "far 1", "pid": 17, "started": 1.0, "since": 0.0}
    (folder / NAME).write_text(json.dumps(record | facts))
    heartbeat = folder / ".owner-0a"
    heartbeat.touch()
    return heartbeat


def test_a_later_claim_takes_it(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run", "job", 8)
    first.assert_held()
    second = RunLock(tmp_path / "run", "job", 8)
    assert second.held()
    assert not first.held(), "a node that wakes up must find that it has lost the folder"
    own = rf"process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-.* owns the run .*run now"
    with pytest.raises(UserError, match=own):
        first.assert_held()
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == sorted([NAME, f".owner-{second.token}"])
    second.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME], "nothing else is left behind"


def test_two_runs_do_not_meet(tmp_path: Path) -> None:
    one, other = RunLock(tmp_path / "a", "job", 8), RunLock(tmp_path / "b", "job", 8)
    assert one.held()
    assert other.held()


@pytest.mark.parametrize("text", [None, "", "[]", '{"token": "x"', "{}", "[" * 10**5])
def test_a_lost_or_torn_file_is_not_held(text: str | None, tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "job", 8)
    (tmp_path / NAME).unlink()
    if text is not None:
        (tmp_path / NAME).write_text(text)
    assert not lock.held()
    with pytest.raises(UserError, match=r"owns the run|somebody else"):
        lock.assert_held()
    assert last_global_batch(tmp_path, "job") is None
    refuse_owned(tmp_path, None)


@pytest.mark.parametrize(
    ("number", "held", "refused"),
    [
        (errno.EIO, True, True),
        (errno.ESTALE, True, True),
        (errno.EMFILE, True, True),
        (errno.EACCES, False, True),  # another account's
        (errno.EILSEQ, False, False),  # torn
    ],
)
def test_a_read_that_fails_ends_no_run_and_lets_none_take_it(
    number: int, held: bool, refused: bool, tmp_path: Path
) -> None:
    lock = RunLock(tmp_path, "job", 8)
    with mock.patch.object(lock_module, "read_json", side_effect=OSError(number, "it says nothing")):
        assert lock.held() == held
        with pytest.raises(UserError, match="it says nothing") if refused else nullcontext():
            refuse_owned(tmp_path, None)
    later = RunLock(tmp_path, "job", 8)
    assert not lock.held(), "and tells of a later start as soon as it can be read"
    assert later.held()


def test_two_claims_at_one_moment_leave_the_owner_its_heartbeat(tmp_path: Path) -> None:
    """A start that loses must not remove the sign that the winner lives: a third would take the run from it."""
    RunLock(tmp_path, "job", 8)
    (tmp_path / ".owner-0a").touch()  # of one that is about to write the lock
    lock = RunLock(tmp_path, "job", 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NAME, ".owner-0a", f".owner-{lock.token}"])


def test_only_the_same_launch_goes_on(tmp_path: Path) -> None:
    assert last_global_batch(tmp_path, "job") is None, "there was no start"
    RunLock(tmp_path, "job", 24)
    assert last_global_batch(tmp_path, "job") == 24
    assert last_global_batch(tmp_path, "another") is None
    assert last_global_batch(tmp_path, None) is None, "a run started by hand must be told to resume"
    RunLock(tmp_path, None, 24)
    assert last_global_batch(tmp_path, "job") is None, "the last start was somebody else's"
    assert last_global_batch(tmp_path, None) is None


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the run's folder .*file/run cannot be written: Not a directory"):
        RunLock(tmp_path / "file/run", None, 1)


# --- Whether the start before lives ---------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_start_that_a_full_disk_refuses_leaves_nothing(there: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if there:
        run.mkdir()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("os.replace", side_effect=full), pytest.raises(UserError, match="No space left on device"):
        RunLock(run, None, 8)
    assert list(tmp_path.rglob("*")) == ([run] if there else [])


def test_on_one_machine_a_process_is_looked_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = holder(run, "job")
    seen = sorted(run.iterdir())
    with pytest.raises(UserError, match=f"process {process.pid} on .* owns the run .* still trains it"):
        refuse_owned(run, None)
    process.send_signal(signal.SIGSTOP)  # one that is suspended will go on
    with pytest.raises(UserError, match="still trains it"):
        refuse_owned(run, "another job")
    process.send_signal(signal.SIGCONT)
    assert sorted(run.iterdir()) == seen, "a refused start writes nothing"
    refuse_owned(run, "job")  # the launcher's own restart
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    refuse_owned(run, None)  # killed, though its parent has not taken note
    process.wait()
    refuse_owned(run, None)
    again = holder(run)
    assert len(list(run.glob(".owner-*"))) == 1
    again.communicate("\n")
    assert [path.name for path in run.iterdir()] == [NAME], "a start that ended needs no look"
    refuse_owned(run, None)


def test_the_same_number_may_be_another_process(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, None, 8)
    record = json.loads((tmp_path / NAME).read_text())
    elsewhere(tmp_path, machine=record["machine"], pid=os.getppid(), started=0.5)
    refuse_owned(tmp_path, None)
    assert not lock.held()


def test_a_run_of_this_process_is_no_other(tmp_path: Path) -> None:
    RunLock(tmp_path, None, 8)
    refuse_owned(tmp_path, None)


def test_on_another_machine_the_heartbeat_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_STALE", 1.0)
    heartbeat = elsewhere(tmp_path)
    refuse_owned(tmp_path, None)  # it did not go on
    monkeypatch.setattr(lock_module, "_STALE", 60.0)  # the first renewal is seen, whenever it comes
    heartbeat.touch()
    going = threading.Event()

    def beat() -> None:
        while not going.wait(0.1):
            os.utime(heartbeat)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match=r"process 17 on far, since 19.* still trains it"):
        refuse_owned(tmp_path, None)
    going.set()
    thread.join()
    os.utime(heartbeat, (0, 0))
    refuse_owned(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".owner-0a", NAME]


def test_where_the_file_system_does_not_say_nobody_is_taken_for_dead(tmp_path: Path) -> None:
    """The clock of the file system is that of a file that is made, which a quota may forbid."""
    elsewhere(tmp_path)
    assert in_training(tmp_path)
    with mock.patch.object(Path, "touch", side_effect=OSError(errno.EDQUOT, "Disk quota exceeded")):
        assert in_training(tmp_path) is None
        with pytest.raises(UserError, match="Disk quota exceeded"):
            refuse_owned(tmp_path, None)


def test_a_heartbeat_goes_on_and_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_HEARTBEAT", 0.05)
    lock = RunLock(tmp_path, None, 8)
    heartbeat = tmp_path / f".owner-{lock.token}"
    os.utime(heartbeat, (0, 0))
    deadline = time.monotonic() + 60
    while heartbeat.stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    later = RunLock(tmp_path, None, 8)
    assert not heartbeat.exists()
    time.sleep(0.2)
    assert not heartbeat.exists(), "a start that lost the lock made its heartbeat anew"
    lock.release()
    assert later.held()


@pytest.mark.parametrize(
    "facts",
    [
        {"pid": "17", "machine": None},
        {"pid": -1},
        {"since": "yesterday"},
        {"since": 1e300, "host": 5},
        {"token": ["x"]},
        {"global_batch_size": "8"},
    ],
    ids=str,
)
def test_odd_owners(facts: dict[str, Any], tmp_path: Path) -> None:
    os.utime(elsewhere(tmp_path, **facts), (0, 0))
    refuse_owned(tmp_path, None)
    assert last_global_batch(tmp_path, "other") is None


def test_two_launches_in_one_slurm_job_are_two(tmp_path: Path) -> None:
    """The second took the first for its own earlier life. A job that is queued again is told by its restarts."""
    lock = RunLock(tmp_path, "slurm-7.0.aa", 24)
    assert last_global_batch(tmp_path, "slurm-7.0.aa") == 24
    assert last_global_batch(tmp_path, "slurm-7.0.bb") is None
    assert last_global_batch(tmp_path, "slurm-7.1.cc") == 24
    assert last_global_batch(tmp_path, "slurm-8.1.cc") is None
    found = json.loads((tmp_path / NAME).read_text())
    parent = os.getppid()  # a process that lives, and is not this one
    started = float(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    (tmp_path / NAME).write_text(json.dumps({**found, "pid": parent, "started": started}))
    refuse_owned(tmp_path, "slurm-7.0.aa")
    with pytest.raises(UserError, match="still trains it"):
        refuse_owned(tmp_path, "slurm-7.0.bb")
    refuse_owned(tmp_path, "slurm-7.1.cc")  # its batch host was cut off, and its steps go on
    (tmp_path / NAME).write_text(json.dumps({**found, "pid": parent, "started": started, "job": "slurm-7.1.cc"}))
    with pytest.raises(UserError, match="still trains it"):
        refuse_owned(tmp_path, "slurm-7.0.aa")  # what is left of the earlier start takes nothing back
    assert last_global_batch(tmp_path, "slurm-7.0.aa") is None
    lock.release()
    refuse_owned(tmp_path, "slurm-7.0.bb")
