"""A power cut at any moment of a save of two ranks: the old checkpoint or the new one, never neither (law 5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crashes import Disk, Flush, can_trace, check, record
from tests.runs import Runs

pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(not can_trace(), reason="strace is not there, or may not")]


@pytest.fixture(scope="module")
def disk(runs: Runs, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return record(runs, tmp_path_factory.mktemp("crashes") / "run", conversations, saves=1)


def test_every_state_resumes_from_the_old_or_the_new(disk: Disk, place: Path) -> None:
    found = check(disk, place, 60)
    assert [reason for reason, _ in found.faults] == []
    assert found.states == 60
    assert len(found.resumed) > 1, "states from before the save, and from after it"


def test_without_the_flushes_it_is_lost(disk: Disk, place: Path) -> None:
    """That the check can fail: the same operations, none of which waits for the disk."""
    unflushed = [one for one in disk.operations if not isinstance(one, Flush)]
    found = check(Disk(disk.folders, disk.files, unflushed), place, 60)
    assert any("no checkpoint is whole" in reason for reason, _ in found.faults)
