"""A slow rank is named with its host; the comparison is gathered over real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina.train.deepspeed import Ranks
from lumina.train.liveness.stragglers import Comparison, Stragglers, probe

HOSTS = ["a", "a", "b", "b"]
EVEN = [0.1, 0.1, 0.1, 0.1]


def comparison(
    compute: list[float], probes: list[float], factor: float = 1.5, flops: list[float] | None = None, sequence: int = 1
) -> Comparison:
    hosts = HOSTS[: len(compute)]
    # The others wait for the slowest: their wait is long, and says nothing against them.
    wait = [max(compute) - value for value in compute]
    return Comparison(hosts, compute, wait, probes, flops or [1e9] * len(compute), factor, sequence)


def test_even_ranks() -> None:
    assert comparison([0.1, 0.12, 0.11, 0.149], EVEN).slow() == []


@pytest.mark.parametrize("slow", range(4))
def test_the_slow_one_is_named(slow: int) -> None:
    compute = list(EVEN)
    compute[slow] = 0.3
    (line,) = comparison(compute, EVEN).slow()
    assert line == f"rank {slow} on {HOSTS[slow]} is a straggler: compute takes 300.0 ms, 3.0 times the median"


def test_more_work_makes_no_rank_slow() -> None:
    """Ranks that share rows: where the answer is, the output layer is computed. One with more work that is slow for it
    is named, and so is one without counted work; one with less work, only when the others are waiting for it."""
    assert comparison([0.1, 0.5], [0.1, 0.1], flops=[1e9, 6e9]).slow() == []
    assert comparison([0.12, 0.1], [0.1, 0.1], flops=[1e9, 6e9]).slow() == []
    assert len(comparison([0.1, 0.5], [0.1, 0.1], flops=[1e9, 2e9]).slow()) == 1
    assert len(comparison([0.5, 0.1], [0.1, 0.1], flops=[1e9, 2e9]).slow()) == 1
    assert len(comparison([0.5, 0.1], [0.1, 0.1], flops=[0.0, 2e9]).slow()) == 1


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_part_of_a_row_is_compared_with_the_same_part_of_others(factor: float) -> None:
    """The last part takes longer, but less for each FLOP than the first: its slow rank must not pass for that."""
    compared = comparison([0.2, 0.6, 0.2, 0.6 * factor], EVEN, flops=[1e9, 6e9, 1e9, 6e9], sequence=2)
    assert [line.partition(" on ")[0] for line in compared.slow()] == (["rank 3"] if factor > 1 else [])
    probes = comparison(EVEN, [0.1, 0.3, 0.1, 0.3], sequence=2)
    assert len(probes.slow()) == 2, "each rank's probe is the same work"


def test_two_ranks_have_no_middle() -> None:
    """The median is the faster one: otherwise half of two could never be slow."""
    assert len(comparison([0.1, 0.3], [0.1, 0.1]).slow()) == 1


def test_the_probe_finds_it_under_zero_3() -> None:
    """There the forward pass waits for the others, so that all ranks compute for equally long."""
    (line,) = comparison(EVEN, [0.001, 0.001, 0.004, 0.001]).slow()
    assert "rank 2 on b is a straggler: probe takes 4.0 ms" in line


def test_the_factor_is_the_users() -> None:
    assert comparison([0.1, 0.1, 0.1, 0.25], EVEN, factor=3.0).slow() == []
    assert len(comparison([0.1, 0.1, 0.25, 0.25], EVEN, factor=2.0).slow()) == 2


def test_times_of_nothing() -> None:
    assert comparison([0.0] * 4, [0.0] * 4).slow() == []


def test_the_record_is_json() -> None:
    found = json.loads(json.dumps(comparison([0.1, 0.3], [0.1, 0.1]).record()))
    assert found["hosts"] == ["a", "a"]
    assert found["wait"] == [0.2, 0.0]
    assert len(found["slow"]) == 1


def test_alone_there_is_nothing_to_compare() -> None:
    alone = Stragglers(Ranks(0, 1, 0, 1), interval=1, factor=1.5)
    alone.add(0.1, 0.1, 1e9)
    assert alone.compare(1) is None
    assert probe("cpu") > 0


_RANK = """
import json, os, sys
import torch.distributed as dist
from lumina.train.deepspeed import Ranks
from lumina.train.liveness.stragglers import Stragglers
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
stragglers = Stragglers(Ranks(rank, 2, rank, 2), interval=3, factor=1.5)
found = {}
for step in range(1, 8):
    slow = rank == (1 if step <= 3 else 0)  # rank 1 is slow at first, rank 0 then
    stragglers.add(0.3 if slow else 0.1, 0.0 if slow else 0.2, 1e9 * (1 + rank))
    compared = stragglers.compare(step)
    if compared is not None:
        found[step] = compared.record()
if child:
    os.waitpid(child, 0)
print(json.dumps(found), flush=True)
os._exit(0)
"""


def test_two_processes_compare_themselves(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RANK, str(tmp_path / "meeting")],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    said: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == 2, done.stderr
    assert said[0] == said[1], "every rank has the same figures"
    assert list(said[0]) == ["3", "6"], "every third step"
    host = socket.gethostname()
    for step, compute, slow in (("3", [0.1, 0.3], 1), ("6", [0.3, 0.1], 0)):
        found = said[0][step]
        assert found["hosts"] == [host, host]
        assert found["compute"] == pytest.approx(compute, abs=1e-6), "of the steps since the last comparison"
        assert found["wait"] == pytest.approx([0.2 if rank != slow else 0.0 for rank in range(2)], abs=1e-6)
        assert all(value > 0 for value in found["probe"])
        named = [line for line in found["slow"] if "compute" in line]
        assert named == [f"rank {slow} on {host} is a straggler: compute takes 300.0 ms, 3.0 times the median"]
