"""Spike detector: limits of a step's loss and gradient norm, from the median and the spread of the steps before it.

The loss is the mean over all ranks and the norm is the global one, so every rank holds the same two numbers to the same
limits and no rank asks another. The comparison that refuses an update is made on the device, with limits that are known
before the step. The baselines are part of the checkpoint: a resumed run decides as the run would have that nothing
disturbed (law 6).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lumina.config import Config
from lumina.train.health import RollingWindow

# Nothing is a spike that the baseline itself has seen. Where most of the data is learned by heart and some is not,
# losses have two heights, and the spread about the lower one says nothing of the other.
_ABOVE_ALL = 1.5

NOT_FINITE, LOSS_SPIKE, GRAD_EXPLOSION = "not-finite", "loss-spike", "grad-explosion"


class Anomaly(NamedTuple):
    """What is wrong with a step: the rule that it breaks, as docs/health.md names it, and why, for people."""

    rule: str
    reason: str


class SpikeDetector:
    """Baselines of the loss and the gradient norm, and the steps that were refused by them."""

    def __init__(self, config: Config, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self._window = config.health_window
        self._losses = RollingWindow(self._window, state.get("losses", ()))
        self._norms = RollingWindow(self._window, state.get("norms", ()))
        self._refused: list[int] = [int(step) for step in state.get("refused", ())]
        self.refused_in_a_row = int(state.get("refused_in_a_row", 0))  # since the last update that was made
        self._warmup = min(config.health_warmup, config.health_window)
        self._deviations = config.spike_deviations
        self._factor = config.grad_explosion_factor
        self._loss_on = LOSS_SPIKE not in config.disabled_rules
        self._norm_on = GRAD_EXPLOSION not in config.disabled_rules
        self._period = config.health_check_interval

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "losses": self._losses.values(),
            "norms": self._norms.values(),
            "refused": self._refused,
            "refused_in_a_row": self.refused_in_a_row,
        }

    def loss_limit(self) -> float:
        """The loss above which a step is a spike: infinite while there is no baseline."""
        if not self._loss_on or len(self._losses) < self._warmup:
            return math.inf
        middle, sigma = self._losses.spread()
        return max(middle + self._deviations * max(sigma, 0.1 * abs(middle)), _ABOVE_ALL * self._losses.largest())

    def norm_limit(self) -> float:
        """The gradient norm above which a step is an explosion: infinite while there is no baseline."""
        if not self._norm_on or len(self._norms) < self._warmup:
            return math.inf
        middle, sigma = self._norms.spread()
        return max(self._factor * middle, middle + self._deviations * sigma, _ABOVE_ALL * self._norms.largest())

    def classify(self, loss: float, norm: float) -> Anomaly | None:
        """What is wrong with a step of this loss and gradient norm, if anything; asked before it enters the
        baselines."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return not_finite(loss, norm)
        if loss > (limit := self.loss_limit()):
            middle = self._losses.median()
            return Anomaly(LOSS_SPIKE, f"loss {loss:.4g} against a median of {middle:.4g} (limit {limit:.4g})")
        if norm > (limit := self.norm_limit()):
            middle = self._norms.median()
            reason = f"gradient norm {norm:.4g} against a median of {middle:.4g} (limit {limit:.4g})"
            return Anomaly(GRAD_EXPLOSION, reason)
        return None

    def accept(self, loss: float, norm: float) -> None:
        """A step that was applied enters the baselines."""
        self._losses.add(loss)
        self._norms.add(norm)
        self.refused_in_a_row = 0

    def refuse(self, step: int) -> list[int]:
        """Note a refused step; returns those refused within the last `health_check_interval` steps, this one too."""
        self.refused_in_a_row += 1
        self._refused = [early for early in self._refused if step - early < self._period] + [step]
        return list(self._refused)

    def forget_refused(self) -> None:
        """Count the refused steps anew: there was no checkpoint to go back to."""
        self._refused = []

    def measure_anew(self) -> None:
        """Forget the baselines: there are no limits until `health_warmup` updates were made."""
        self._losses, self._norms = RollingWindow(self._window), RollingWindow(self._window)


def not_finite(loss: float, norm: float) -> Anomaly:
    """A step whose loss or gradient norm is infinite or NaN."""
    return Anomaly(NOT_FINITE, f"loss {loss:.4g}, gradient norm {norm:.4g}")
