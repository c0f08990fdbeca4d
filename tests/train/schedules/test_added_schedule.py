"""A schedule of another installed package: chosen by name in the configuration, and used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lumina.config import UserError, load
from lumina.train.schedules import schedule

STAIRCASE = """
def staircase(config, total_steps):
    return lambda step: config.learning_rate / 2 ** (2 * step // total_steps)

THING = staircase
"""


def test_it_is_found_by_its_entry_point(install: Callable[..., None]) -> None:
    install("lumina.schedules", "stairs", STAIRCASE)
    config = load("nano", {"lr_scheduler": "stairs", "learning_rate": 0.5})
    rates = schedule(config, 4)
    assert [rates(step) for step in range(4)] == [0.5, 0.5, 0.25, 0.25]


def test_a_misspelt_one_is_told_the_near_one() -> None:
    with pytest.raises(UserError, match=r"`lr_scheduler` \(given 'cosin'\): no such schedule: cosin. Did you mean cos"):
        load("nano", {"lr_scheduler": "cosin"})
