"""One step's figures, as metrics.jsonl stores them and the console prints them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_LABELS = {
    "rewards/margins": "Margin",
    "rewards/accuracies": "Accuracy",
    "rewards/chosen": "Chosen",
    "rewards/rejected": "Rejected",
}


@dataclass(frozen=True)
class HealthStatus:
    """What the health rules say of a run at a step; `reason` is the gravest and latest one, empty when it is well."""

    level: Literal["ok", "warn", "crit"] = "ok"
    reason: str = ""

    def __str__(self) -> str:
        """`OK`, `WARN(reason)` or `CRIT(reason)`, as the console line and metrics.jsonl have it."""
        return "OK" if self.level == "ok" else f"{self.level.upper()}({self.reason})"


@dataclass
class StepRecord:
    """step and epoch count from 1; loss in nats per supervised token, NaN without one; tokens over all ranks; memory in
    bytes of this rank's device (CPU: resident set); samples says which samples all ranks together trained on
    (lumina.data.samples_id); mfu is None where the device's peak is unknown; time in seconds since 1970.
    tokens_per_s and supervised_tokens_per_s count the step and its wait for data; seconds is what the time since the
    step before went to (lumina.train.deepspeed.timing); of_objective: what the objective tells beside the loss, by
    name, which metrics.jsonl has among the others; experts: of a mixture of experts, lumina.model.ExpertBalance's
    fields; exchanged_bytes: that left this rank in the step for those that it shares rows with, None where it has rows
    of its own."""

    step: int
    epoch: int
    batch: int
    batches: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    tokens_per_s: float
    memory: int
    memory_total: int
    memory_kind: str
    health: HealthStatus
    time: float
    applied: bool = True
    samples: str = ""
    supervised_tokens_per_s: float | None = None
    seconds: dict[str, float] | None = None
    mfu: float | None = None
    of_objective: dict[str, float] = field(default_factory=dict)
    experts: dict[str, float] | None = None
    exchanged_bytes: int | None = None
    ppl: float = field(init=False)

    def __post_init__(self) -> None:
        self.ppl = perplexity(self.loss)

    def shown(self, value: float, digits: int) -> str:
        """The loss or the perplexity for people: `none` of a step in which nothing is supervised."""
        return f"{value:.{digits}f}" if self.supervised_tokens else "none"


def figure_label(name: str) -> str:
    """What people are shown for an objective's figure: preference training's by their words, others by their name."""
    return _LABELS.get(name, name)


def figures_text(figures: Mapping[str, float]) -> str:
    """`Margin: 0.1234 | Accuracy: 0.7500 | Chosen: …`: the objective's figures in a line of the console."""
    order = [*(name for name in _LABELS if name in figures), *(name for name in figures if name not in _LABELS)]
    return " | ".join(f"{figure_label(name)}: {figures[name]:.4f}" for name in order)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows a float; NaN of NaN."""
    return math.inf if loss >= 700 else math.exp(loss)
