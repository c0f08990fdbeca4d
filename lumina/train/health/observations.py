"""Observations, the inputs of health rules: a step, an evaluation, the layers, the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepObservation:
    """One optimizer step. loss in nats per supervised token, NaN without one; wait: seconds spent waiting for data, of
    `seconds` altogether; memory in bytes; anomaly: the rule and the reason by which the spike detector refused the
    update, or would have; loss_scale: fp16's, None elsewhere; supervised_shares: of each sample's tokens, the
    supervised ones, where that is known."""

    step: int
    loss: float
    grad_norm: float
    applied: bool
    tokens_per_s: float = math.nan
    wait: float = 0.0
    seconds: float = math.nan
    memory: int = 0
    anomaly: tuple[str, str] | None = None
    loss_scale: float | None = None
    supervised_shares: tuple[float, ...] = ()

    @property
    def supervised(self) -> bool:
        """Whether anything in the step is supervised. If not, it has no loss and makes no update."""
        return not self.supervised_shares or any(self.supervised_shares)


@dataclass(frozen=True)
class EvaluationObservation:
    """An evaluation, with the median training loss of the steps since the one before."""

    step: int
    loss: float
    train_loss: float


@dataclass(frozen=True)
class LayerFigures:
    """Norms over a layer: its gradient before clipping, its weights, and the update that the optimizer made."""

    gradient: float
    weight: float
    update: float

    @property
    def update_ratio(self) -> float:
        return self.update / self.weight if self.weight else math.inf if self.update else 0.0


@dataclass(frozen=True)
class LayerObservation:
    """Every layer's figures at one step."""

    step: int
    layers: dict[str, LayerFigures]


@dataclass(frozen=True)
class GpuFigures:
    """One GPU: degrees Celsius, what slows its clocks ("" for nothing), uncorrected memory errors since the driver
    started."""

    index: int
    temperature: float
    throttled: str = ""
    ecc_errors: int = 0


@dataclass(frozen=True)
class MachineObservation:
    """The machine: free bytes on the disk of each watched folder, the size of a checkpoint, and the GPUs."""

    free: dict[str, int] = field(default_factory=dict)
    checkpoint_bytes: int = 0
    gpus: tuple[GpuFigures, ...] = ()
