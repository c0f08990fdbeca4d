"""Whether a step's update may be made: its loss and gradient norm are held to limits that are known before it.

The loss is the mean over all ranks and the norm is the global one, so every rank holds the same two numbers to the same
limits and no rank asks another. The limits come from the steps before it, and the comparison is made on the device. The
baseline is part of the checkpoint: a resumed run decides as the run would have that nothing disturbed (law 6).
"""

from __future__ import annotations

import math
from typing import Any

from lumina.config import Config
from lumina.train.health import RollingWindow

NOT_FINITE, LOSS_SPIKE, GRAD_EXPLOSION = "not-finite", "loss-spike", "grad-explosion"


class Guard:
    """Baselines of the loss and the gradient norm, and the steps that were refused by them."""

    def __init__(self, config: Config, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self._losses = RollingWindow(config.health_window, state.get("losses", ()))
        self._norms = RollingWindow(config.health_window, state.get("norms", ()))
        self._refused: list[int] = [int(step) for step in state.get("refused", ())]
        self._warmup = min(config.health_warmup, config.health_window)
        self._deviations = config.spike_deviations
        self._factor = config.grad_explosion_factor
        self._loss_on = LOSS_SPIKE not in config.disabled_rules
        self._norm_on = GRAD_EXPLOSION not in config.disabled_rules
        self._period = config.health_check_interval

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": self._losses.values(), "norms": self._norms.values(), "refused": self._refused}

    def loss_limit(self) -> float:
        """The loss above which a step is a spike: infinite while there is no baseline."""
        if not self._loss_on or len(self._losses) < self._warmup:
            return math.inf
        middle, sigma = self._losses.spread()
        return middle + self._deviations * max(sigma, 0.1 * abs(middle))

    def judge_loss(self, loss: float) -> str | None:
        """Why this loss is a spike, or None."""
        limit = self.loss_limit()
        if not loss > limit:
            return None
        return f"loss {loss:.4g} against a median of {self._losses.median():.4g} (limit {limit:.4g})"

    def norm_limit(self) -> float:
        """The gradient norm above which a step is an explosion: infinite while there is no baseline."""
        if not self._norm_on or len(self._norms) < self._warmup:
            return math.inf
        middle, sigma = self._norms.spread()
        return max(self._factor * middle, middle + self._deviations * sigma)

    def judge_norm(self, norm: float) -> str | None:
        limit = self.norm_limit()
        if not limit < norm < math.inf:
            return None
        return f"gradient norm {norm:.4g} against a median of {self._norms.median():.4g} (limit {limit:.4g})"

    def accept(self, loss: float, norm: float) -> None:
        """A step that was applied enters the baselines."""
        self._losses.add(loss)
        self._norms.add(norm)

    def refuse(self, step: int) -> list[int]:
        """Note a refused step; returns those refused within the last `health_check_interval` steps, this one too."""
        self._refused = [early for early in self._refused if step - early < self._period] + [step]
        return list(self._refused)

    def forgive(self) -> None:
        """Forget the refused steps: there was nothing to go back to."""
        self._refused = []
