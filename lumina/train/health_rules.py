"""The rules of the health monitor, one class each; docs/health.md lists them with their thresholds.

A rule is shown what it watches (a step, an evaluation, the layers, the machine) and returns a reason while something is
wrong, None otherwise. It keeps its own baseline, and adds a value to that only after judging it. What becomes of a
reason (once per episode, the console's word, the event log) is lumina.train.health's business.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from lumina.config import Config
from lumina.monitor.events import Level
from lumina.train.statistics import Window, median

Seen = TypeVar("Seen")


# --- What is seen ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSeen:
    """A step. loss in nats per supervised token; wait: seconds spent waiting for data, of `seconds` altogether; memory
    in bytes; refused: the guard's rule and reason when the update was refused or should have been; loss_scale: fp16's,
    None elsewhere."""

    step: int
    loss: float
    grad_norm: float
    applied: bool
    tokens_per_s: float = math.nan
    wait: float = 0.0
    seconds: float = math.nan
    memory: int = 0
    refused: tuple[str, str] | None = None
    loss_scale: float | None = None


@dataclass(frozen=True)
class EvaluationSeen:
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
class LayersSeen:
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
class MachineSeen:
    """The machine: free bytes on the disk of each watched folder, the size of a checkpoint, and the GPUs."""

    free: dict[str, int] = field(default_factory=dict)
    checkpoint_bytes: int = 0
    gpus: tuple[GpuFigures, ...] = ()


# --- Rules ----------------------------------------------------------------------------------------


class Rule(ABC, Generic[Seen]):
    """`name` as in docs/health.md and `health_off`; `hold`: whether an episode lasts health_check_interval steps beyond
    the last sign of it (else it ends with it)."""

    name: ClassVar[str]
    level: ClassVar[Level] = "warn"
    hold: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def check(self, seen: Seen) -> str | None:
        """What is wrong with what was seen, in words; None when nothing is."""


class LossNotFinite(Rule[StepSeen]):
    name, level, hold = "loss-not-finite", "crit", False

    def check(self, seen: StepSeen) -> str | None:
        return None if math.isfinite(seen.loss) else "loss is not finite"


class SkippedInARow(Rule[StepSeen]):
    name, level, hold = "skipped-in-a-row", "crit", False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._row = 0

    def check(self, seen: StepSeen) -> str | None:
        self._row = 0 if seen.applied else self._row + 1
        return f"{self._row} updates skipped in a row" if self._row >= 3 else None


class NotFinite(Rule[StepSeen]):
    name = "not-finite"

    def check(self, seen: StepSeen) -> str | None:
        if seen.applied or (seen.refused is not None and seen.refused[0] != self.name):
            return None
        return f"update of step {seen.step} skipped: gradient not finite"


class LossSpike(Rule[StepSeen]):
    name = "loss-spike"

    def check(self, seen: StepSeen) -> str | None:
        return f"step {seen.step}: {seen.refused[1]}" if seen.refused and seen.refused[0] == self.name else None


class GradExplosion(LossSpike):
    name = "grad-explosion"


class GradVanishing(Rule[StepSeen]):
    name = "grad-vanishing"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._norms = Window(config.health_window)
        self._row = 0

    def check(self, seen: StepSeen) -> str | None:
        if not math.isfinite(seen.grad_norm):
            return None
        if len(self._norms) < self.config.health_warmup:
            self._norms.add(seen.grad_norm)
            return None
        middle = self._norms.median()
        if seen.grad_norm > self.config.grad_vanishing_factor * middle:
            self._row = 0
            self._norms.add(seen.grad_norm)
            return None
        self._row += 1
        return f"gradient norm {seen.grad_norm:.3g}, median {middle:.3g}" if self._row >= 8 else None


class Plateau(Rule[StepSeen]):
    name = "plateau"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._losses: deque[float] = deque(maxlen=config.plateau_steps)
        self._reason: str | None = None

    def check(self, seen: StepSeen) -> str | None:
        self._losses.append(seen.loss)
        size = self.config.plateau_steps
        if len(self._losses) < size:
            return None
        if seen.step % max(1, size // 20) == 0:  # two sorts of thousands of values: now and then
            values = [loss for loss in self._losses if math.isfinite(loss)]
            before, after = median(values[: len(values) // 2]), median(values[len(values) // 2 :])
            gain = (before - after) / abs(before) if before else 0.0
            flat = gain < self.config.plateau_gain
            self._reason = f"the loss fell by {gain:.2%} in {size // 2} steps" if flat else None
        return self._reason


class Divergence(Rule[EvaluationSeen]):
    name = "divergence"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._last: EvaluationSeen | None = None
        self._row = 0

    def check(self, seen: EvaluationSeen) -> str | None:
        last, self._last = self._last, seen
        if last is None:
            return None
        self._row = self._row + 1 if seen.loss > last.loss and seen.train_loss < last.train_loss else 0
        if self._row < self.config.divergence_evaluations:
            return None
        return f"evaluation loss rose {self._row} times in a row, to {seen.loss:.4g}, while training loss fell"


class LossScaleCollapse(Rule[StepSeen]):
    name, level = "loss-scale-collapse", "crit"

    def check(self, seen: StepSeen) -> str | None:
        if seen.loss_scale is None or seen.loss_scale >= self.config.loss_scale_floor:
            return None
        return f"fp16 loss scale {seen.loss_scale:g}: gradients underflow or are never finite"


class LayerDead(Rule[LayersSeen]):
    name = "layer-dead"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._suspects: set[str] = set()

    def check(self, seen: LayersSeen) -> str | None:
        limit = self.config.layer_dead_fraction * median(f.gradient for f in seen.layers.values())
        low = {name for name, figures in seen.layers.items() if figures.gradient <= limit}
        dead, self._suspects = sorted(low & self._suspects), low
        return f"{dead[0]} gets no gradient" + _others(dead) if dead else None


class LayerExploding(Rule[LayersSeen]):
    name = "layer-exploding"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._gradients: dict[str, Window] = {}

    def check(self, seen: LayersSeen) -> str | None:
        found = []
        for name, figures in seen.layers.items():
            baseline = self._gradients.setdefault(name, Window(32))
            limit = self.config.layer_gradient_factor * baseline.median() if len(baseline) >= 4 else math.inf
            if figures.update_ratio > self.config.layer_update_ratio:
                found.append(f"{name}'s update is {figures.update_ratio:.2g} times its weights")
            elif figures.gradient > limit:
                found.append(f"{name}'s gradient norm is {figures.gradient:.3g}, median {baseline.median():.3g}")
            else:
                baseline.add(figures.gradient)
        return found[0] + _others(found) if found else None


def _others(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


class ThroughputFall(Rule[StepSeen]):
    name = "throughput-fall"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._speeds = Window(config.health_window)
        self._row = 0

    def check(self, seen: StepSeen) -> str | None:
        middle = self._speeds.median() if len(self._speeds) >= self.config.health_warmup else 0.0
        if not seen.tokens_per_s < self.config.throughput_fall * middle:
            self._row = 0
            self._speeds.add(seen.tokens_per_s)
            return None
        self._row += 1
        return f"{seen.tokens_per_s:.0f} tokens/s, median {middle:.0f}" if self._row >= 16 else None


class DataStarvation(Rule[StepSeen]):
    name = "data-starvation"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._shares = Window(config.health_window)

    def check(self, seen: StepSeen) -> str | None:
        self._shares.add(seen.wait / seen.seconds)
        share = self._shares.median()
        if len(self._shares) < self.config.health_warmup or share <= self.config.data_wait_fraction:
            return None
        return f"{share:.0%} of a step is spent waiting for data"


class MemoryGrowth(Rule[StepSeen]):
    name = "memory-growth"
    _SLACK = 256 * 2**20  # a small process's ordinary ups and downs, in bytes

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._recent = Window(config.health_warmup)
        self._seen = 0
        self._base: float | None = None

    def check(self, seen: StepSeen) -> str | None:
        self._seen += 1
        self._recent.add(seen.memory)
        if self._seen % self.config.health_warmup:  # once per window of its own
            return None
        now = self._recent.median()
        if self._base is None:
            if self._seen >= 2 * self.config.health_warmup:  # the first window still grows: buffers are being made
                self._base = now
            return None
        if now <= max(self._base * (1 + self.config.memory_growth), self._base + self._SLACK):
            return None
        before, self._base = self._base, now  # growing on, it is said again at the next such step up
        return f"memory grew from {before / 2**30:.2f} to {now / 2**30:.2f} GiB"


class DiskFull(Rule[MachineSeen]):
    name, hold = "disk-full", False

    def check(self, seen: MachineSeen) -> str | None:
        needed = self.config.disk_free_checkpoints * seen.checkpoint_bytes
        short = [(free, folder) for folder, free in seen.free.items() if free < needed]
        if not short:
            return None
        free, folder = min(short)
        return f"{free / 2**30:.2f} GiB free at {folder}, a checkpoint takes {seen.checkpoint_bytes / 2**30:.2f} GiB"


class GpuTemperature(Rule[MachineSeen]):
    name, hold = "gpu-temperature", False

    def check(self, seen: MachineSeen) -> str | None:
        hot = [gpu for gpu in seen.gpus if gpu.temperature >= self.config.gpu_temperature]
        return f"GPU {hot[0].index} is at {hot[0].temperature:.0f} degrees Celsius" if hot else None


class GpuThrottled(Rule[MachineSeen]):
    name, hold = "gpu-throttled", False

    def check(self, seen: MachineSeen) -> str | None:
        slow = [gpu for gpu in seen.gpus if gpu.throttled]
        return f"GPU {slow[0].index} is slowed down: {slow[0].throttled}" if slow else None


class GpuEcc(Rule[MachineSeen]):
    name, level = "gpu-ecc", "crit"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._known: dict[int, int] = {}

    def check(self, seen: MachineSeen) -> str | None:
        """New errors only: those from before the run are its first sight's baseline."""
        found = None
        for gpu in seen.gpus:
            known = self._known.setdefault(gpu.index, gpu.ecc_errors)
            if gpu.ecc_errors > known:
                found = found or f"GPU {gpu.index} has {gpu.ecc_errors - known} uncorrected memory errors"
        return found


STEP_RULES: tuple[type[Rule[StepSeen]], ...] = (
    LossNotFinite,
    SkippedInARow,
    NotFinite,
    LossSpike,
    GradExplosion,
    GradVanishing,
    Plateau,
    LossScaleCollapse,
    ThroughputFall,
    DataStarvation,
    MemoryGrowth,
)
EVALUATION_RULES: tuple[type[Rule[EvaluationSeen]], ...] = (Divergence,)
LAYER_RULES: tuple[type[Rule[LayersSeen]], ...] = (LayerDead, LayerExploding)
MACHINE_RULES: tuple[type[Rule[MachineSeen]], ...] = (DiskFull, GpuTemperature, GpuThrottled, GpuEcc)
# Reported from elsewhere in the run: lumina.train.saving, .answers and .stragglers.
REPORTED = ("save-failed", "backup-failed", "corrupt-sample", "straggler")


def rule_names() -> list[str]:
    """Every rule that `health_off` may name."""
    rules: tuple[type[Rule[Any]], ...] = (*STEP_RULES, *EVALUATION_RULES, *LAYER_RULES, *MACHINE_RULES)
    return [str(rule.name) for rule in rules] + list(REPORTED)
