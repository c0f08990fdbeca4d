"""What is said of a checkpoint whose model had other rotary angles when it was trained."""

from __future__ import annotations

import pytest

from lumina.checkpoint import TrainerState, other_angles, rotary_angles
from lumina.config import load


@pytest.mark.parametrize(
    ("seq_length", "step", "recorded", "said"),
    [
        (131_072, 9, "", False),  # as it was
        (131_073, 9, "", True),
        (131_073, 0, "", False),  # imported: no step of ours
        (131_073, 9, "float32", True),
        (131_073, 9, "float64", False),
        (131_072, 9, "float32", False),
    ],
)
def test_other_rotary_angles(seq_length: int, step: int, recorded: str, said: bool) -> None:
    config = load("nano", {"seq_length": seq_length})
    assert rotary_angles(config) == ("float64" if seq_length > 2**17 else "float32")
    text = other_angles(TrainerState(step=step, rotary_angles=recorded), config)
    assert bool(text) == said
    assert not said or f"its {step} steps" in text
    assert not said or ("may have been" in text) == (recorded == ""), "float64's were there before they were recorded"


def test_a_model_without_rotary_positions_has_none_that_could_be_others() -> None:
    config = load("nano", {"seq_length": 2**18, "family": "smollm3", "num_layers": 2, "nope_layers": [0, 1]})
    assert other_angles(TrainerState(step=1), config) == ""
