"""Console: a line per logged step, in the form of the early README's, or the live view where there is a terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from lumina.monitor.events import Event
from lumina.monitor.metrics import read_metrics
from lumina.monitor.step_record import StepRecord, figures_text
from lumina.monitor.terminal.live_view import LiveView
from lumina.terminal import console

_GIB = 2**30
_SECONDS_TO_PROGRESS, _SECONDS_BETWEEN_PROGRESS = 3.0, 10.0
_SECONDS_BETWEEN_LINES = 1.0  # fast steps print once a second; metrics.jsonl has them all


def line(record: StepRecord) -> str:
    """`Epoch 1 | Step    150 | Batch  150/2000 | Loss: 2.456789 | PPL: 11.67 | LR: 8.50e-05 | GradNorm: 0.8432 |
    Tokens/s: 1250 | GPU: 8.2GB/16.0GB | Health: OK`, in one line; `Mem:` instead of `GPU:` on a CPU. An objective with
    figures of its own shows these in the place of the perplexity, which is of tokens."""
    memory = f"{record.memory / _GIB:.1f}GB/{record.memory_total / _GIB:.1f}GB"
    loss, ppl = record.shown(record.loss, 6), record.shown(record.ppl, 2)
    more = figures_text(record.of_objective) if record.of_objective else f"PPL: {ppl}"
    return (
        f"Epoch {record.epoch} | Step {record.step:6d} | Batch {record.batch:4d}/{record.batches} | "
        f"Loss: {loss} | {more} | LR: {record.lr:.2e} | GradNorm: {record.grad_norm:.4f} | "
        f"Tokens/s: {record.tokens_per_s:.0f} | {record.memory_kind}: {memory} | Health: {record.health}"
    )


class Console:
    """Shows a run's progress on one rank; the others get a silent one (`enabled=False`). In a terminal that is the
    live view, with printed lines above it; elsewhere it is the early README's lines. before: it shows what comes
    before the run's first step, and leaves nothing behind in a terminal."""

    def __init__(
        self,
        enabled: bool,
        total_steps: int,
        start_step: int,
        title: str = "lumina",
        live: bool = True,
        before: bool = False,
    ) -> None:
        self._rich = console(file=sys.stdout, soft_wrap=True)
        self._enabled = enabled
        self._last_line = 0.0
        self._doing, self._next_progress = "", 0.0
        self._total = total_steps
        self._live: LiveView | None = None
        if enabled and live and self._rich.is_terminal and not self._rich.is_dumb_terminal:
            self._live = LiveView(self._rich, title, total_steps, start_step, transient=before)

    @property
    def live(self) -> bool:
        """Whether it is the live view."""
        return self._live is not None

    def __enter__(self) -> Console:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        if self._enabled:
            self._rich.print(text, markup=False)

    def replay(self, metrics: Path) -> None:
        """Take the curves of the run's earlier starts into the live view."""
        if self._live is not None:
            self._live.replay(read_metrics(metrics))

    def step(self, record: StepRecord) -> None:
        if not self._enabled:
            return
        if self._live is not None:
            self._live.step(record)
            return
        now = time.monotonic()
        notable = record.step in (1, self._total) or record.health.level != "ok"
        if notable or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(line(record))

    def progress(self, what: str, done: int, total: int, unit: str = "", size: int = 1) -> None:
        """`Evaluating 37/193`: in the live view, or as a line, from a few seconds on and then every ten. size: how many
        of what is counted make one `unit`; the numbers shown are rounded so that they differ until all is done."""
        shown = f"{what} {done // size}/{-(-total // size)}{unit}"
        if self._live is not None:
            self._live.progress(shown if done < total else "")
        now = time.monotonic()
        if done <= 1 or what != self._doing:
            self._doing, self._next_progress = what, now + _SECONDS_TO_PROGRESS
        elif self._live is None and done < total and now >= self._next_progress:
            self._next_progress = now + _SECONDS_BETWEEN_PROGRESS
            self.say(shown)

    def evaluation(self, step: int, loss: float) -> None:
        if self._live is not None:
            self._live.evaluation(step, loss)

    def event(self, event: Event) -> None:
        if self._live is not None:
            self._live.event(event)
