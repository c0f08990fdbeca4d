"""A process without heartbeats is ended and says where it stood; one with them is left alone. In real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lumina.cluster.signals import EXIT_HUNG

PATIENCE = 120
_START = """
import ctypes, os, signal, sys, time
from lumina.cluster.signals import StopRequest
from lumina.train.liveness import watchdog
from lumina.train.liveness.watchdog import Watchdog
def stuck(wait):
    wait(600)
"""
SCRIPTS = {
    "stall": """
with Watchdog(1.0, 0, StopRequest(), rank=3) as dog:
    dog.heartbeat("step 7, update")
    stuck(time.sleep)
""",
    # PyDLL keeps the interpreter's lock while it calls C: no Python thread runs any more.
    "lock": """
watchdog._GRACE = 0.5
with Watchdog(2.0, 0, StopRequest(), rank=3) as dog:
    dog.heartbeat("step 7, update")
    time.sleep(0.8)
    dog.heartbeat("step 8, update")
    stuck(ctypes.PyDLL(None).sleep)
""",
    "signal": """
with Watchdog(0, 1.0, StopRequest(), rank=3) as dog:
    dog.heartbeat("step 7, update")
    os.kill(os.getpid(), signal.SIGUSR1)
    stuck(time.sleep)
""",
    # The first heartbeat may take longer than the others, and a child that was forked lives on.
    "heartbeats": """
watchdog._SUSPENDED = 0.5  # a machine that stalls as a whole
with Watchdog(2.0, 2.0, StopRequest(), rank=3) as dog:
    child = os.fork()
    if child == 0:
        stuck(time.sleep)
    time.sleep(2.6)
    for number in range(60):
        dog.heartbeat(f"step {number}")
        time.sleep(0.05)
os.kill(child, signal.SIGKILL)
print("done")
""",
    # Marks of a step's passes are progress, also after a signal; what stands still then is named with the last one.
    "marks": """
watchdog._SUSPENDED = 0.5
with Watchdog(2.0, 2.0, StopRequest(), rank=3) as dog:
    dog.heartbeat("step 7, micro-batch 1")
    for layer in range(9):
        if layer == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        dog.progress.mark(f"layer {layer}")
    print("passed", flush=True)
    stuck(time.sleep)
""",
    # Stopped for longer than either clock allows, with a stop asked for or without; then a hang all the same.
    "suspended": """
watchdog._GRACE, watchdog._SUSPENDED = 0.5, 0.5
with Watchdog(2.0, 2.0, StopRequest(), rank=3) as dog:
    for number in range(100):
        dog.heartbeat(f"step {number}")
        print(number, flush=True)
        time.sleep(0.05)
print("done")
""",
    "suspended in a step": """
watchdog._GRACE, watchdog._SUSPENDED = 0.5, 0.5
with Watchdog(3.0, 3.0, StopRequest(), rank=3) as dog:
    dog.heartbeat("step 7, update")
    print("begun", flush=True)
    stuck(time.sleep)
""",
    "late start": """
with Watchdog(0.5, 0, StopRequest(), rank=3, start_timeout=1.0) as dog:
    stuck(time.sleep)
""",
    # Left and entered again: nothing is watched in between, and then from the beginning.
    "again": """
with Watchdog(1.0, 0, StopRequest(), rank=3) as dog:
    dog.heartbeat("reference")
time.sleep(1.2)
with dog:
    time.sleep(1.6)
    dog.heartbeat("step 7, update")
    print("alive", flush=True)
    stuck(time.sleep)
""",
    # Rank 0 waits in a collective for rank 1, which sleeps and has no watchdog of its own.
    "collective": """
import torch, torch.distributed as dist
from lumina.cluster.signals import end_with_parent
rank = 0 if os.fork() else 1
if rank == 1:
    end_with_parent(signal.SIGKILL)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
if rank == 1:
    stuck(time.sleep)
with Watchdog(1.0, 0, StopRequest(), rank=0) as dog:
    dog.heartbeat("step 7, update")
    stuck(lambda _: dist.all_reduce(torch.ones(1)))
""",
}


@dataclass
class Ended:
    code: int
    out: str
    err: str
    reported: str  # what torch's elastic agent would read


class Started:
    """Every script at once: they mostly wait."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes = {
            name: self._start(name, script) for name, script in SCRIPTS.items() if "suspended" not in name
        }

    def _start(self, name: str, script: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(self._folder / name), "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-c", _START + script, str(self._folder / "meeting")]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **streams)  # type: ignore[call-overload,no-any-return]

    def suspend(self, name: str, seconds: float) -> float:
        """Start it, stop it after its first line, as Ctrl-Z or `scontrol suspend` do, and let it go on; when that line
        came, by the monotonic clock."""
        process = self._processes[name] = self._start(name, SCRIPTS[name])
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        return began

    def end(self, name: str) -> Ended:
        process = self._processes[name]
        out, err = process.communicate(timeout=PATIENCE)
        file = self._folder / name
        reported = json.loads(file.read_text())["message"]["message"] if file.exists() else ""
        return Ended(process.returncode, out, err, reported)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    processes = Started(tmp_path_factory.mktemp("watchdog"))
    yield processes
    processes.close()


def test_a_stall_ends_with_stacks(started: Started) -> None:
    ended = started.end("stall")
    assert ended.code == EXIT_HUNG, ended.err
    assert "WATCHDOG rank 3: no progress for" in ended.err
    assert "in: step 7, update" in ended.err
    assert "in stuck" in ended.err, "the main thread's stack"
    assert ended.reported.startswith("hung: rank 3: no progress")


def test_a_held_lock_is_no_hiding_place(started: Started) -> None:
    ended = started.end("lock")
    assert ended.code == -signal.SIGABRT, ended.err
    assert "WATCHDOG rank 3: no Python code has run for" in ended.err
    assert "in stuck" in ended.err


def test_no_boundary_after_a_signal(started: Started) -> None:
    ended = started.end("signal")
    assert ended.code == EXIT_HUNG, ended.err
    assert "within 1 s of SIGUSR1" in ended.reported


def test_heartbeats_keep_it_quiet(started: Started) -> None:
    ended = started.end("heartbeats")
    assert (ended.code, ended.out, ended.err, ended.reported) == (0, "done\n", "", "")


def test_marks_within_a_step_keep_it_quiet_until_they_end(started: Started) -> None:
    ended = started.end("marks")
    assert (ended.code, ended.out) == (EXIT_HUNG, "passed\n"), ended.err
    assert "in: step 7, micro-batch 1, after layer 8" in ended.reported


def test_a_start_has_a_limit_too(started: Started) -> None:
    ended = started.end("late start")
    assert ended.code == EXIT_HUNG, ended.err
    assert "in: starting" in ended.err


def test_it_can_be_entered_again(started: Started) -> None:
    ended = started.end("again")
    assert (ended.code, ended.out) == (EXIT_HUNG, "alive\n"), ended.err
    assert "in: step 7, update" in ended.reported


def test_the_collective_is_named(started: Started) -> None:
    ended = started.end("collective")
    assert ended.code == EXIT_HUNG, ended.err
    assert "in the collective all_reduce" in ended.reported
    assert "all_reduce" in ended.err.partition("Thread MainThread")[2], "and its stack is there"


def test_suspended_time_is_no_hang(started: Started) -> None:
    started.suspend("suspended", 5.0)
    ended = started.end("suspended")
    assert (ended.code, ended.err, ended.reported) == (0, "", "")
    assert ended.out.endswith("99\ndone\n")


@pytest.mark.long
def test_a_hang_around_a_suspension_is_found_all_the_same(started: Started) -> None:
    began = started.suspend("suspended in a step", 6.0)
    ended = started.end("suspended in a step")
    assert ended.code == EXIT_HUNG, ended.err
    (seconds,) = re.findall(r"no progress for (\d+) s", ended.reported)
    assert int(seconds) <= time.monotonic() - began - 5.0, "the suspended time was counted"
