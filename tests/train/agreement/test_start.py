"""What the ranks find out of each other before the first step."""

from __future__ import annotations

from lumina.train.agreement.start import readers_of


def test_files_of_a_machine_are_read_once() -> None:
    """Where they are not one on all machines; ranks whose folders differ on one machine each read their own."""
    one, other = [(1, 10, 5)], [(2, 10, 5)]
    assert readers_of([("n0", one), ("n0", one), ("n1", one)]) is None, "they are one file system's"
    assert readers_of([("n0", one), ("n0", one), ("n1", other), ("n1", other)]) == [0, 0, 2, 2]
    assert readers_of([("n0", one), ("n0", other), ("n1", one), ("n0", other)]) == [0, 1, 2, 1]
