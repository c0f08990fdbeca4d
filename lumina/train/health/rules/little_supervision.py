"""A tenth of the samples of recent steps have no supervised tokens, or next to none."""

from __future__ import annotations

from collections import deque

from lumina.config import Config
from lumina.train.health.observations import StepObservation
from lumina.train.health.rule import Rule


class LittleSupervision(Rule[StepObservation]):
    """`least`: the share of a sample's tokens below which its supervision is next to nothing; `most`: the share of such
    samples, over `health_window` steps, above which it warns."""

    observes = StepObservation
    every_step = True
    settings = ("health_window", "health_warmup")

    def __init__(self, config: Config, least: float = 0.002, most: float = 0.1) -> None:
        super().__init__(config)
        self._least, self._most = least, most
        self._steps: deque[tuple[int, int]] = deque(maxlen=config.health_window)  # samples, and those with little

    def check(self, observed: StepObservation) -> str | None:
        shares = observed.supervised_shares
        self._steps.append((len(shares), sum(share < self._least for share in shares)))
        samples, little = (sum(column) for column in zip(*self._steps, strict=True))
        if (
            len(self._steps) < min(self.config.health_warmup, self.config.health_window)
            or little <= self._most * samples
        ):
            return None
        return (
            f"{little / samples:.0%} of the samples of the last {len(self._steps)} steps have under {self._least:.1%}"
            " of their tokens supervised: prepare the data anew, shorten long questions or raise seq_length"
        )


RULE = LittleSupervision
