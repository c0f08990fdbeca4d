"""What a run shows and records: console line and live view, metrics.jsonl, events.jsonl, trackers, reports."""

from lumina.monitor.events import Event, EventLog, Level, read_events
from lumina.monitor.metrics import MetricsFile, read_metrics
from lumina.monitor.recorder import Recorder
from lumina.monitor.run_json import read_run
from lumina.monitor.step_record import HealthStatus, StepRecord, figures_text, perplexity
from lumina.monitor.terminal import Console, line

__all__ = [
    "Console",
    "Event",
    "EventLog",
    "HealthStatus",
    "Level",
    "MetricsFile",
    "Recorder",
    "StepRecord",
    "figures_text",
    "line",
    "perplexity",
    "read_events",
    "read_metrics",
    "read_run",
    "reports",
]
