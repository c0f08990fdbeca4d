"""Ranks that share a row compute what one process computes, whatever the heads, the documents and the loss."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lumina.model import SequenceGroup
from lumina.train.deepspeed import init_process_group
from tests.model.parallel.ranks import CASES
from tests.model.tiny_models import make_model
from tests.runs import clean_environment

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """By case; one start of four processes for all of them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.parallel.ranks", str(tmp_path_factory.mktemp("ranks") / "meeting")],
        env=clean_environment() | {"GLOO_SOCKET_IFNAME": "lo"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_shared_rows_are_as_whole_ones(name: str, differences: dict[str, dict[str, float]]) -> None:
    """Loss, units and every gradient in float64; in bfloat16 no further from float64 than twice a whole row's are."""
    found = differences[name]
    assert found["shared"] <= (1e-12 if "whole" not in found else 2 * found["whole"] + 1e-6)


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 2), (4, 4)])
def test_the_bytes_that_documentation_names(size: int, kv_heads: int, differences: dict[str, dict[str, float]]) -> None:
    """Of 4 query heads of width 8 over 2 key/value heads; `kv_heads`: as repeated for so many ranks."""
    numbers = (2 * 4 + 2 * kv_heads) * 8 * (size - 1) / size
    sent = differences[f"sent, {size} ranks"]
    assert sent["bytes"] == 2 * 8 * numbers, "forward and backward, eight bytes each"
    assert sent["told"] == sent["bytes"], "what a step's record says"


def test_whole_rows_are_a_ranks_own() -> None:
    """A pass over rows that come without their documents is not shared, as one with a cache is not."""
    model, ids = make_model(), torch.arange(20).view(2, 10)
    positions = torch.arange(10).expand(2, -1)
    expected = model(ids, positions)
    model.share_rows(SequenceGroup(0, 2, None))  # type: ignore[arg-type]
    assert torch.equal(model(ids, positions), expected)


def test_a_program_may_join_another_process_group(differences: dict[str, dict[str, float]]) -> None:
    """Over gloo a group still sums when it was given back; torch knows it no more, and sets no timeout for it."""
    assert differences["another process group"] == {"sum": 2.0, "known": 1.0}


def test_every_collective_counts_as_communication(differences: dict[str, dict[str, float]]) -> None:
    """Whoever waits in one for a slow rank does not compute: the sum of pairs' log-probabilities is one of them."""
    assert differences["clock"]["untimed"] == 0
    assert differences["clock"]["timed"] > 2 * 4


def test_waiting_for_the_others_is_no_computing() -> None:
    """Each collective of the group runs inside `exchanging`: else the peers of a slow rank look as slow as it."""
    init_process_group()
    assert dist.group.WORLD is not None
    inside, seen = [False], []

    @contextmanager
    def exchanging(sent: int) -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    group = SequenceGroup(0, 1, dist.group.WORLD, exchanging)
    for name in ("all_reduce", "all_to_all_single"):
        call = getattr(dist, name)

        def noted(*given: object, call: object = call, **more: object) -> object:
            seen.append(inside[0])
            return call(*given, **more)  # type: ignore[operator]

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(dist, name, noted)
            if name == "all_reduce":
                group.sum(torch.ones(2))
            else:
                x_1THd = torch.ones(1, 4, 2, 8)
                group.attend(lambda q, k, v: q, x_1THd, x_1THd, x_1THd)
    assert seen == [True] * 3
    assert not inside[0]


@pytest.mark.long  # about the other tests: what they notice changes only when the code or its tests do
@pytest.mark.timeout(1800)
def test_every_mutant_is_caught() -> None:
    command = [sys.executable, "-m", "tests.model.parallel.mutations"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "MISSED" not in run.stdout
