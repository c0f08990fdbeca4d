"""How many ranks share a row of a start, by the processes that it has; what a resume says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina.checkpoint import TrainerState, model_shape
from lumina.config import UserError
from lumina.train.deepspeed import Ranks
from lumina.train.initialise import Start, check_resumed, sequence_groups
from lumina.train.recovery.record import RecoveryRecord
from tests.train.tiny_engines import make_config


@pytest.mark.parametrize(
    ("asked", "left", "fitting"),
    [(4, 8, 4), (4, 4, 4), (4, 3, 1), (4, 2, 2), (4, 1, 1), (4, 6, 2), (6, 4, 2), (6, 3, 3), (3, 4, 1), (1, 5, 1)],
)
def test_a_launch_that_lost_ranks_goes_on_with_the_largest_size_that_fits(asked: int, left: int, fitting: int) -> None:
    assert sequence_groups(asked, left, relaunched=True) == fitting
    # By the rule's own words, without its arithmetic.
    assert fitting == max(size for size in range(1, asked + 1) if asked % size == 0 and left % size == 0)


@pytest.mark.parametrize(("asked", "world"), [(4, 3), (4, 2), (2, 1), (3, 4)])
def test_another_launch_is_refused(asked: int, world: int) -> None:
    with pytest.raises(UserError, match=f"sequence_parallel_size {asked} does not divide .*, {world}"):
        sequence_groups(asked, world, relaunched=False)


def test_whole_groups_are_taken_as_they_are() -> None:
    assert sequence_groups(2, 4, relaunched=False) == 2


@pytest.mark.parametrize(("recorded", "lines"), [("", 1), ("float64", 0)])
def test_a_resume_says_that_its_rotary_angles_are_others(recorded: str, lines: int) -> None:
    config, data = make_config(seq_length=2**17 + 1), SimpleNamespace(train=SimpleNamespace(fingerprint="f"))
    state = TrainerState(step=7, model=model_shape(config), data_fingerprint="f", rotary_angles=recorded)
    start, unused = Start(config, Path("run/checkpoints/step-00000007"), state, {}, RecoveryRecord()), Ranks(0, 1, 0, 1)
    given: Any = data
    said = check_resumed(start, config, given, unused)
    assert len(said) == lines
    assert all(line.startswith(f"WARNING: {start.checkpoint}: its 7 steps") for line in said)
