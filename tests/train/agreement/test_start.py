"""What the ranks find out of each other before the first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lumina.config import UserError
from lumina.train.agreement.start import agree_on_contents, readers_of
from lumina.train.deepspeed import Ranks


def test_data_that_a_rank_cannot_look_at_is_told_to_all(tmp_path: Path) -> None:
    """A UserError is what `together` makes of it, on every rank; a bare OSError would be this rank's alone."""
    with pytest.raises(UserError, match="gone"):
        agree_on_contents(Ranks(0, 1, 0, 1, sequence=2), [SimpleNamespace(folder=tmp_path / "gone")])  # type: ignore[list-item]


def test_files_of_a_machine_are_read_once() -> None:
    """Where they are not one on all machines; ranks whose folders differ on one machine each read their own."""
    one, other = [(1, 10, 5)], [(2, 10, 5)]
    assert readers_of([("n0", one), ("n0", one), ("n1", one)]) is None, "they are one file system's"
    assert readers_of([("n0", one), ("n0", one), ("n1", other), ("n1", other)]) == [0, 0, 2, 2]
    assert readers_of([("n0", one), ("n0", other), ("n1", one), ("n0", other)]) == [0, 1, 2, 1]
