"""Three or more updates skipped in a row."""

from __future__ import annotations

from lumina.config import Config
from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule


class SkippedInARow(Rule[StepObservation]):
    observes = StepObservation
    level, hold = "crit", False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._row = 0

    def check(self, observed: StepObservation) -> str | None:
        self._row = 0 if observed.applied else self._row + 1
        return f"{self._row} updates skipped in a row" if self._row >= 3 else None


RULE = SkippedInARow
