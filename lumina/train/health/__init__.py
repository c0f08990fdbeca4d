"""Health of a run: rules check what is observed, the monitor turns what they find into episodes (docs/health.md)."""

from lumina.train.health.machine import MachineWatch
from lumina.train.health.monitor import Health
from lumina.train.health.observations import (
    EvaluationObservation,
    GpuFigures,
    LayerFigures,
    LayerObservation,
    MachineObservation,
    StepObservation,
)
from lumina.train.health.rule import ReportedRule, Rule
from lumina.train.health.statistics import RollingWindow, median

__all__ = [
    "EvaluationObservation",
    "GpuFigures",
    "Health",
    "LayerFigures",
    "LayerObservation",
    "MachineObservation",
    "MachineWatch",
    "ReportedRule",
    "RollingWindow",
    "Rule",
    "StepObservation",
    "median",
]
