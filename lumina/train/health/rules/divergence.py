"""Evaluation loss rises while training loss falls."""

from __future__ import annotations

from lumina.config import Config
from lumina.train.health.observations import EvaluationObservation
from lumina.train.health.rule import Rule


class Divergence(Rule[EvaluationObservation]):
    observes = EvaluationObservation
    settings = ("divergence_evaluations",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._last: EvaluationObservation | None = None
        self._row = 0

    def check(self, observed: EvaluationObservation) -> str | None:
        last, self._last = self._last, observed
        if last is None:
            return None
        self._row = self._row + 1 if observed.loss > last.loss and observed.train_loss < last.train_loss else 0
        if self._row < self.config.divergence_evaluations:
            return None
        return f"evaluation loss rose {self._row} times in a row, to {observed.loss:.4g}, while training loss fell"


RULE = Divergence
