"""The word at the end of the console line."""

from __future__ import annotations

import math

from lumina.train.health import Health


def test_ok() -> None:
    health = Health(100)
    assert [health.check(step, 2.0, True) for step in (1, 2, 3)] == ["OK"] * 3


def test_a_skipped_update_warns_for_the_window() -> None:
    health = Health(3)
    assert health.check(1, 2.0, True) == "OK"
    warning = "WARN(update of step 2 skipped: gradient not finite)"
    assert health.check(2, 2.0, False) == warning
    assert [health.check(step, 2.0, True) for step in (3, 4, 5)] == [warning, warning, "OK"]


def test_three_in_a_row_are_critical() -> None:
    health = Health(2)
    found = [health.check(step, 2.0, False) for step in (5, 6, 7, 8)]
    assert [text.split("(")[0] for text in found] == ["WARN", "WARN", "CRIT", "CRIT"]
    assert found[2:] == ["CRIT(3 updates skipped in a row)", "CRIT(4 updates skipped in a row)"]
    # One good update ends the row; the warning about the last skipped one stays for its window.
    assert health.check(9, 2.0, True) == "WARN(update of step 8 skipped: gradient not finite)"
    assert health.check(10, 2.0, True) == "OK"
    assert health.check(11, 2.0, False).startswith("WARN(update of step 11")


def test_a_loss_that_is_not_finite_is_critical_while_it_lasts() -> None:
    health = Health(100)
    for step, loss in enumerate((math.nan, math.inf, -math.inf), 1):
        assert health.check(step, loss, True) == "CRIT(loss is not finite)"
    assert health.check(4, 2.0, True) == "OK"
    assert health.check(5, math.nan, False) == "CRIT(loss is not finite)"
    assert health.check(6, 2.0, True).startswith("WARN(update of step 5")
