"""Every process group of a process has one timeout, whoever made it; under a watchdog none to speak of."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lumina.train.deepspeed import import_deepspeed, init_process_group, set_collective_timeout


@pytest.fixture
def groups() -> Iterator[list[dist.ProcessGroup]]:
    """That of all ranks, and two that are made without a timeout, DeepSpeed's way and torch's."""
    init_process_group()
    made = [dist.new_group([0]), import_deepspeed().comm.new_group([0])]
    assert dist.group.WORLD is not None
    yield [dist.group.WORLD, *made]
    set_collective_timeout()
    for group in made:
        dist.destroy_process_group(group)


def timeout(group: dist.ProcessGroup) -> timedelta:
    found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return found


def test_all_groups_have_that_of_the_first(groups: list[dist.ProcessGroup]) -> None:
    own = import_deepspeed().constants.default_pg_timeout
    assert timeout(groups[0]) == own
    assert any(timeout(group) != own for group in groups), "torch's defaults are the same: nothing is tested"
    set_collective_timeout()
    assert [timeout(group) for group in groups] == [own] * 3


def test_under_a_watchdog_a_collective_may_wait_for_days(groups: list[dist.ProcessGroup]) -> None:
    set_collective_timeout(watched=True)
    assert all(timeout(group) >= timedelta(days=1) for group in groups)
    set_collective_timeout()
    assert all(timeout(group) < timedelta(hours=1) for group in groups)
