"""The base classes of health rules; each file of lumina/train/health/rules/ is one rule.

A rule is given what it observes (a step, an evaluation, the layers, the machine) and returns a reason while something
is wrong, None otherwise. It keeps its own baseline, and adds a value to that only after comparing it. What follows from
a reason (once per episode, the console's word, the event log) is lumina.train.health.monitor's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from lumina.config import Config
from lumina.monitor import Level

Observation = TypeVar("Observation")


class Rule(ABC, Generic[Observation]):
    """One health rule, a new object for each run. Its name is its file's (or its entry point's), its meaning in
    docs/health.md the first line of its file.

    observes: the class of lumina.train.health.observations that `check` is given; None for a rule that is only reported
    from elsewhere. level: of its events. hold: whether an episode lasts health_check_interval steps beyond the last
    sign of it (else it ends with it). settings: the keys of Config that decide it, for the document. every_step:
    whether a rule of steps is also given those in which nothing is supervised, without a loss or an update.

    A new rule, ours or another package's, needs no keys in the schema: what the configuration's `rule_settings` gives
    under its name goes to its constructor as keyword arguments:

        class LossAbove(Rule[StepObservation]):
            observes = StepObservation

            def __init__(self, config: Config, limit: float = 10.0) -> None: ...

    and in the YAML `rule_settings: {loss-above: {limit: 9.0}}`.
    """

    observes: ClassVar[type[Any] | None] = None
    level: ClassVar[Level] = "warn"
    hold: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ()
    every_step: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def check(self, observed: Observation) -> str | None:
        """What is wrong with what was observed, in words; None when nothing is."""


class ReportedRule(Rule[None]):
    """A rule that is not checked here: other parts of the run report it to the monitor by name."""

    def check(self, observed: None) -> str | None:
        return None
