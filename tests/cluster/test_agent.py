"""The exit code of an agent that was sent a signal: 75 where its ranks saved, and nowhere else."""

from __future__ import annotations

import signal

import pytest

from lumina.cluster.elastic.agent import exit_code

TERM, HUP = signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize(
    ("number", "ranks", "code"),
    [
        (TERM, {75}, 75),
        (HUP, {75}, 75),
        (TERM, {-TERM}, 143),  # ended by the signal: they had not begun to train
        (HUP, {-HUP}, 129),
        (TERM, {143}, 143),  # the same, said by the rank itself
        (TERM, set(), 143),  # none was started
        (TERM, {75, -TERM}, 75),
        (TERM, {75, 1}, 1),
        (TERM, {-signal.SIGKILL}, 1),
    ],
)
def test_75_only_where_a_rank_saved(number: signal.Signals, ranks: set[int], code: int) -> None:
    assert exit_code(number, ranks) == code
