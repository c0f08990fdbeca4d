"""Health monitor: runs the rules over each observation and turns what they find into episodes.

An episode begins when a rule first gives a reason and ends when it has been silent for health_check_interval steps (or
at once, for rules whose cause is plainly gone). Its beginning and end go to the event log, its beginning to the log;
while it lasts, the console line says WARN(reason) or CRIT(reason), the gravest and latest one.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

from lumina.config import HEALTH_RULES, Config, UserError
from lumina.monitor import EventLog, HealthStatus, Level
from lumina.train.health.observations import (
    EvaluationObservation,
    LayerObservation,
    MachineObservation,
    StepObservation,
)
from lumina.train.health.rule import Rule
from lumina.train.health.statistics import RollingWindow

log = logging.getLogger("lumina")


@dataclass
class _Episode:
    level: Level
    reason: str
    began: int
    last: int  # the step of the latest sign
    firing: bool
    hold: bool


class Health:
    """The rules and their episodes. Rank 0 has one that writes; the other ranks' event log has no file.

    Raises:
        UserError: another package's rule does not load, or does not take its rule_settings.
    """

    def __init__(self, config: Config, events: EventLog) -> None:
        self._events = events
        self._interval = config.health_check_interval
        self._disabled = set(config.disabled_rules)
        self._rules = {name: _make(name, config) for name in HEALTH_RULES.names() if name not in self._disabled}
        self._open: dict[str, _Episode] = {}
        self._step = 0
        self._since_evaluation = RollingWindow(10_000)

    # --- What the rules observe ---

    def step(self, observed: StepObservation) -> HealthStatus:
        """Check a step; returns the run's health after it."""
        self._step = observed.step
        self._since_evaluation.add(observed.loss)
        self._check(observed)
        for name, episode in list(self._open.items()):
            silent = not episode.firing and (not episode.hold or observed.step - episode.last >= self._interval)
            if silent:
                self._end(name)
        return self.status()

    def evaluation(self, step: int, loss: float) -> None:
        train = self._since_evaluation.median()
        self._since_evaluation.clear()
        self._check(EvaluationObservation(step, loss, train))

    def layers(self, observed: LayerObservation) -> None:
        self._check(observed)

    def machine(self, observed: MachineObservation) -> None:
        self._check(observed)

    def _check(self, observed: object) -> None:
        for name, rule in self._rules.items():
            if rule.observes is not type(observed):
                continue
            if isinstance(observed, StepObservation) and not (observed.supervised or rule.every_step):
                continue
            reason = rule.check(observed)
            if reason is not None:
                self._raise(name, rule.level, reason, rule.hold)
            elif name in self._open:
                self._open[name].firing = False

    # --- Reported from elsewhere ---

    def report(self, name: str, level: Level, reason: str, *, lasting: bool = False, **values: Any) -> None:
        """Report a finding of a rule that is not checked here. It lasts health_check_interval steps, or until `clear`
        if `lasting`."""
        if name not in self._disabled:
            self._raise(name, level, reason, hold=True, **values)
            self._open[name].firing = lasting

    def clear(self, name: str) -> None:
        """End the episode of a reported rule."""
        if name in self._open:
            self._end(name)

    # --- Episodes ---

    def _raise(self, name: str, level: Level, reason: str, hold: bool, **values: Any) -> None:
        episode = self._open.get(name)
        if episode is None or (episode.level, level) == ("warn", "crit"):
            self._open[name] = _Episode(level, reason, self._step, self._step, True, hold)
            self._events.add(self._step, "health", level, name, reason, **values)
            log.log(logging.ERROR if level == "crit" else logging.WARNING, "step %d: %s: %s", self._step, name, reason)
        else:
            episode.reason, episode.last, episode.firing = reason, self._step, True

    def _end(self, name: str) -> None:
        episode = self._open.pop(name)
        lasted = episode.last - episode.began + 1
        self._events.add(self._step, "health", "info", name, "over", steps=lasted, began=episode.began)

    def status(self) -> HealthStatus:
        """The gravest episode that lasts, of several the latest."""
        if not self._open:
            return HealthStatus()
        worst = max(self._open.values(), key=lambda e: (e.level == "crit", e.last, e.began))
        return HealthStatus("crit" if worst.level == "crit" else "warn", worst.reason)


def _make(name: str, config: Config) -> Rule[Any]:
    kind, settings = HEALTH_RULES.get(name), config.rule_settings.get(name, {})
    try:
        inspect.signature(kind).bind(config, **settings)
    except TypeError as error:
        keys = f": it is set by {', '.join(kind.settings)}" if kind.settings else ""
        raise UserError(f"rule_settings.{name}: {error}{keys}") from None
    made: Rule[Any] = kind(config, **settings)
    return made
