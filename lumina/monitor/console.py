"""The console: the seed's line word for word in form, beside a progress bar where there is a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lumina.monitor.record import StepRecord

_GIB = 2**30
_SECONDS_BETWEEN_LINES = 1.0  # fast steps print once a second; metrics.jsonl has them all


def line(record: StepRecord) -> str:
    """`Epoch 1 | Step    150 | Batch  150/2000 | Loss: 2.456789 | PPL: 11.67 | LR: 8.50e-05 | GradNorm: 0.8432 |
    Tokens/s: 1250 | GPU: 8.2GB/16.0GB | Health: OK`, in one line; `Mem:` instead of `GPU:` on a CPU."""
    memory = f"{record.memory / _GIB:.1f}GB/{record.memory_total / _GIB:.1f}GB"
    return (
        f"Epoch {record.epoch} | Step {record.step:6d} | Batch {record.batch:4d}/{record.batches} | "
        f"Loss: {record.loss:.6f} | PPL: {record.ppl:.2f} | LR: {record.lr:.2e} | GradNorm: {record.grad_norm:.4f} | "
        f"Tokens/s: {record.tokens_per_s:.0f} | {record.memory_kind}: {memory} | Health: {record.health}"
    )


class Console:
    """Prints a run's progress on one rank; the others get a silent one (`enabled=False`)."""

    def __init__(self, enabled: bool, total_steps: int, start_step: int) -> None:
        self._rich = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self._enabled = enabled
        self._last_line = 0.0
        self._total = total_steps
        self._bar: Progress | None = None
        if enabled and self._rich.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._rich, transient=True)
            self._task = self._bar.add_task("training", total=total_steps, completed=start_step)

    def __enter__(self) -> Console:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        if self._enabled:
            self._rich.print(text, markup=False)

    def step(self, record: StepRecord) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step)
        now = time.monotonic()
        notable = record.step in (1, self._total) or record.health != "OK"
        if notable or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(line(record))
