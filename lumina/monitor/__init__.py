"""What a run shows and records: the console line, metrics.jsonl, the loss curve."""

from lumina.monitor.console import Console, line
from lumina.monitor.metrics import MetricsFile, read_metrics
from lumina.monitor.record import StepRecord
from lumina.monitor.recorder import Recorder

__all__ = ["Console", "MetricsFile", "Recorder", "StepRecord", "line", "read_metrics"]
