"""Waiting for the other ranks: it is said for which, Ctrl-C ends it, and so does its time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from lumina.cluster import await_key, await_ranks, free_port
from lumina.cluster.elastic.torch_store import PrefixStore, TCPStore
from lumina.cluster.launcher_detection import Launched
from lumina.cluster.rendezvous import prefix
from lumina.config import UserError
from tests.runs import ROOT, Job, Runs, arguments, clean_environment

STEP = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_JOB_ID": str(os.getpid())}


def first_task(rank: int) -> None:
    """As in one shell of `srun --ntasks=3 --pty bash`."""
    os.environ |= STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "1"}


def last_task(rank: int) -> None:
    """The same in the last of the shells of another step, whose first one has not started it."""
    os.environ |= STEP | {"SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_STEP_ID": "2"}


def expect(job: Job, text: str) -> None:
    """Waits until the rank has said something."""
    deadline = time.monotonic() + 120
    while not any(log.with_suffix(".err").exists() for log in job.logs) or text not in job.stderr():
        assert time.monotonic() < deadline, f"it did not say: {text}"
        assert job.ranks[0].is_alive(), job.stderr()
        time.sleep(0.1)


def test_a_lone_rank_says_for_whom_it_waits_and_ctrl_c_ends_it(runs: Runs, conversations: Path, place: Path) -> None:
    jobs = [runs.start(arguments(place / start.__name__, conversations), patch=start)
            for start in (first_task, last_task)]  # fmt: skip
    expect(jobs[0], "rank 0 of 3 waits for ranks 1-2")
    expect(jobs[1], "rank 2 of 3 waits for rank 0 at 127.0.0.1 port ")
    for job in jobs:
        assert "SLURM_STEP_NUM_TASKS=3 says how many ranks there are" in job.stderr()
        job.signal(signal.SIGINT)
        assert job.wait() == [130], job.stderr()
        assert "Traceback" not in job.stderr()


@pytest.mark.parametrize(("rank", "said"), [(0, "ranks 1-2 did not come"), (2, "rank 0 at 127.0.0.1 port")])
def test_it_ends(rank: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUMINA_AGENT", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(UserError, match=said):
        await_ranks(Launched("torch", rank, 3, rank, 3), patience=0.5)
    monkeypatch.setenv("LUMINA_AGENT", "n0")  # whose launcher starts ranks again, but not after a user's mistake
    with pytest.raises(RuntimeError, match="did not come"):
        await_ranks(Launched("torch", rank, 3, rank, 3), patience=0.5)


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> list[TCPStore]:
    """Where the ranks of a job of three meet, by a rank 0 of which there is only the store."""
    monkeypatch.delenv("LUMINA_AGENT", raising=False)
    monkeypatch.delenv("LUMINA_JOB", raising=False)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    PrefixStore(prefix({}), server).set("lumina/job", "3 ")
    return [server]


def test_rank_0_ends_meanwhile(meeting: list[TCPStore]) -> None:
    seen = PrefixStore(prefix({}), TCPStore("127.0.0.1", meeting[0].port, is_master=False))

    def end() -> None:
        seen.wait(["lumina/rank/2"])
        meeting.clear()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(UserError, match="rank 0 has ended"):
        await_ranks(Launched("torch", 2, 3, 2, 3), patience=60)
    ending.join()


def test_the_store_answers_just_when_a_turn_of_waiting_ends(
    meeting: list[TCPStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the turn was taken for an answer, an error, and the rank asked anew."""
    answer = Future.result

    def just_after(self: Future[Any], timeout: float | None = None) -> Any:
        found = answer(self)
        if timeout is not None:
            raise TimeoutError
        return found

    monkeypatch.setattr(Future, "result", just_after)
    PrefixStore(prefix({}), meeting[0]).set("lumina/all", "")
    assert await_ranks(Launched("torch", 2, 3, 2, 3), patience=60) is not None


def test_another_job_meets_there(meeting: list[TCPStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs whose launchers chose one port: a rank of one would wait in the other's store, or train with it."""
    PrefixStore(prefix({}), meeting[0]).set("lumina/all", "")
    assert await_ranks(Launched("torch", 2, 3, 2, 3), patience=10) is not None
    with pytest.raises(UserError, match=r"rank 2 of 3 met another job at .*, whose rank 2 is there already"):
        await_ranks(Launched("torch", 2, 3, 2, 3), patience=10)
    with pytest.raises(UserError, match=r"rank 1 of 4 met another job at .*, of 3 ranks"):
        await_ranks(Launched("torch", 1, 4, 1, 4), patience=10)
    monkeypatch.setenv("LUMINA_JOB", "another")
    with pytest.raises(UserError, match=r"rank 1 of 3 met another job at"):
        await_ranks(Launched("torch", 1, 3, 1, 3), patience=10)


JOINS = """
from lumina.cluster import await_ranks
from lumina.cluster.launcher_detection import Launched
await_ranks(Launched("torch", 2, 3, 2, 3), patience=600)
"""


def test_a_rank_that_is_started_again_while_the_others_gather(meeting: list[TCPStore]) -> None:
    """As a pod that was restarted: it took its own earlier start for another job. One that lives is another job's."""
    there = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    process = subprocess.Popen([sys.executable, "-P", "-c", JOINS], env=clean_environment() | there, cwd=ROOT)
    store, again = PrefixStore(prefix({}), meeting[0]), Launched("torch", 2, 3, 2, 3)
    store.wait(["lumina/rank/2"], timedelta(seconds=120))
    with pytest.raises(UserError, match="whose rank 2 is there already"):
        await_ranks(again, patience=10)
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="the others did not come"):  # it is let in, and waits
        await_ranks(again, patience=0.5)
    elsewhere = json.loads(store.get("lumina/rank/2")) | {"machine": "another"}
    store.set("lumina/rank/2", json.dumps(elsewhere))
    with pytest.raises(UserError, match="the others did not come"):  # nobody can tell: the newest is let in
        await_ranks(again, patience=0.5)
    store.set("lumina/rank/2", json.dumps(elsewhere))
    store.set("lumina/all", "")
    with pytest.raises(UserError, match="started again when all 3 had met"):
        await_ranks(again, patience=10)


def test_a_listener_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for its first answer without an end, where no Ctrl-C is heard."""
    monkeypatch.delenv("LUMINA_AGENT", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"an answer of 127.0.0.1 port {port} did not come"):
            await_ranks(Launched("torch", 2, 3, 2, 3), patience=1)


def test_a_rank_0_that_says_nothing_more(meeting: list[TCPStore]) -> None:
    with pytest.raises(UserError, match="rank 0 did not say what in 0 s"):
        await_key(meeting[0], "what", 0.2)
    client = TCPStore("127.0.0.1", meeting[0].port, is_master=False)
    threading.Timer(0.3, meeting.clear).start()
    with pytest.raises(UserError, match="rank 0 has ended"):
        await_key(client, "what", 60)


def test_rank_0_cannot_listen_where_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(RuntimeError) as raised:
            await_ranks(Launched("torch", 0, 2, 0, 2), patience=5)
        assert type(raised.value).__name__ == "DistNetworkError"


def test_agents_that_restarted_their_ranks_unequally_often_meet() -> None:
    """A rank that failed alone is started again by its own agent, whose count is then ahead of the others': each looked
    for the ranks under keys of its own, for ten minutes. A store of torchrun's agent outlives a start, and needs it."""
    assert prefix({"TORCHELASTIC_RESTART_COUNT": "1"}) == prefix({"TORCHELASTIC_RESTART_COUNT": "0"}) == prefix({})
    kept = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert prefix(kept | {"TORCHELASTIC_RESTART_COUNT": "1"}) != prefix(kept | {"TORCHELASTIC_RESTART_COUNT": "0"})
