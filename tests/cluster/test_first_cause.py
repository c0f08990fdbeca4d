"""Of the many failures that one makes, the one that began it is named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lumina.cluster.elastic.failures import Failure, first_cause, oom_kills
from lumina.cluster.signals import EXIT_HUNG

# What torch 2.13 with gloo and NCCL says on the ranks that are left.
EFFECTS = [
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.11]:33245",
    "RuntimeError: ../gloo/transport/tcp/pair.cc:534] Read error [10.0.0.1]:4711: Connection reset by peer",
    "RuntimeError: [gloo/transport/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
    "DistBackendError: NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error",
    "DistStoreError: Socket Timeout",
    "BrokenPipeError: [Errno 32] Broken pipe",
    "hung: rank 0: no progress for 9 s (hang_timeout 9) in: step 7, update; in the collective all_reduce, at lumina.x",
]
CAUSES = [
    "RuntimeError: a planted exception",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "ValueError: train.jsonl, line 7: the connection between user and answer is missing",
    "hung: rank 1: no progress for 60 s (hang_timeout 60) in: step 7, micro-batch 1; at lumina.data.loader.next:88",
]


def failure(rank: int, message: str = "", exitcode: int = 1, time: float = 0.0, **more: object) -> Failure:
    return Failure(f"n{rank}", rank, 0, 100 + rank, exitcode, message, time=time, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", EFFECTS)
def test_effects_are_known(text: str) -> None:
    assert failure(0, text).is_effect
    assert failure(0, traceback=f"Traceback (most recent call last):\n  File x\n{text}\n").is_effect


@pytest.mark.parametrize("text", CAUSES)
def test_causes_are_no_effects(text: str) -> None:
    assert not failure(0, text).is_effect


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_is_named_whatever_came_first(cause: str) -> None:
    """Effects can be reported before their cause, and by clocks that go differently."""
    failures = [failure(rank, text, time=float(rank)) for rank, text in enumerate(EFFECTS)]
    failures.append(failure(9, cause, time=1e9))
    random.Random(3).shuffle(failures)
    assert first_cause(failures).rank == 9


def test_a_signal_is_a_cause_but_not_the_agents_own() -> None:
    failures = [failure(0, exitcode=-15, time=1), failure(1, exitcode=-11, time=2), failure(2, EFFECTS[0], time=0)]
    assert first_cause(failures).rank == 1
    assert first_cause(failures).cause() == "ended by SIGSEGV"


def test_the_earliest_of_several_causes() -> None:
    assert first_cause([failure(rank, CAUSES[0], time=float(9 - rank)) for rank in range(5)]).rank == 4


def test_among_effects_alone_the_earliest() -> None:
    assert first_cause([failure(0, EFFECTS[0], time=2), failure(1, EFFECTS[1], time=1)]).rank == 1


@pytest.mark.parametrize(
    ("ended", "wanted"),
    [
        (failure(0, exitcode=-9, out_of_memory=True), "want of memory"),
        (failure(0, exitcode=-9), "ended by SIGKILL"),
        (failure(0, exitcode=-64), "ended by "),
        (failure(0, exitcode=-99), "ended by signal 99"),
        (failure(0, exitcode=EXIT_HUNG), "hung: its watchdog ended it"),
        (failure(0, "hung: here", exitcode=EXIT_HUNG), "hung: here"),
        (failure(0, exitcode=3), "exit code 3"),
        (failure(0, "RuntimeError: x"), "RuntimeError: x"),
    ],
)
def test_what_is_said(ended: Failure, wanted: str) -> None:
    assert wanted in ended.cause()
    assert ended.line() == f"rank 0 on n0 (local rank 0, pid 100): {ended.cause()}"
    assert Failure(**ended.record()) == ended


def test_the_kernels_count() -> None:
    assert oom_kills() >= 0
    if "oom_kill " in Path("/proc/vmstat").read_text():
        lines = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        assert oom_kills() >= int(lines["oom_kill"]) - 100
