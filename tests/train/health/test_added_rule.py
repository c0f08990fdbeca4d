"""A health rule of another installed package: checked by the monitor, with settings of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lumina.config import Config, UserError
from lumina.monitor import EventLog
from lumina.train.health import Health, StepObservation
from tests.train.tiny_engines import make_config

LOSS_ABOVE = """
from lumina.train.health import Rule, StepObservation

class LossAbove(Rule[StepObservation]):
    observes = StepObservation
    level = "crit"

    def __init__(self, config, limit=10.0):
        super().__init__(config)
        self.limit = limit

    def check(self, seen):
        return f"loss {seen.loss:g} above {self.limit:g}" if seen.loss > self.limit else None

THING = LossAbove
"""


def word(config: Config, loss: float) -> str:
    return str(Health(config, EventLog(None)).step(StepObservation(1, loss, 1.0, True, seconds=1.0)))


def test_it_is_checked_with_its_settings(install: Callable[..., None]) -> None:
    install("lumina.health_rules", "loss-above", LOSS_ABOVE)
    assert word(make_config(), 9.5) == "OK"
    assert word(make_config(), 10.5) == "CRIT(loss 10.5 above 10)"
    assert word(make_config(rule_settings={"loss-above": {"limit": 9.0}}), 9.5) == "CRIT(loss 9.5 above 9)"
    assert word(make_config(disabled_rules=["loss-above"]), 10.5) == "OK"


def test_a_setting_that_it_does_not_have_is_refused(install: Callable[..., None]) -> None:
    install("lumina.health_rules", "loss-above", LOSS_ABOVE)
    with pytest.raises(UserError, match=r"rule_settings.loss-above: got an unexpected keyword argument 'limt'"):
        word(make_config(rule_settings={"loss-above": {"limt": 9.0}}), 1.0)


def test_ours_are_set_by_the_schema() -> None:
    with pytest.raises(UserError, match=r"rule_settings.plateau: .*: it is set by plateau_steps, plateau_gain"):
        word(make_config(rule_settings={"plateau": {"steps": 9}}), 1.0)
    with pytest.raises(ValueError, match=r"no such health rule: platau. Did you mean plateau\?"):
        make_config(rule_settings={"platau": {}})
