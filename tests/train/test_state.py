"""The best evaluation, and the patience that evaluations without a gain use up."""

from __future__ import annotations

import math
from typing import Any

from lumina.checkpoint import TrainerState
from lumina.train.state import RunState


def state() -> RunState:
    unused: Any = None
    return RunState(unused, TrainerState(step=7), unused)


def test_patience_begins_anew_with_a_better_evaluation() -> None:
    run = state()
    assert [run.note_evaluation(loss) for loss in (3.0, 3.5, 2.5, 2.5)] == [True, False, True, False]
    assert run.out_of_patience(2) is None
    assert not run.note_evaluation(2.6)
    assert run.out_of_patience(2) == "no better evaluation in 2 (best 2.5000 at step 7)"
    assert run.out_of_patience(None) is None


def test_evaluations_that_are_not_finite_use_it_up() -> None:
    run = state()
    assert not any(run.note_evaluation(loss) for loss in (math.nan, math.inf))
    assert run.out_of_patience(2) == "no better evaluation in 2 (none was finite)"
