"""The live view of a run in a terminal: progress, curves, speed, memory, health and the latest events."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lumina.monitor.events import Event
from lumina.monitor.step_record import StepRecord, figure_label
from lumina.monitor.terminal.braille import plot

_GIB = 2**30
_POINTS = 600  # of a curve; more than a wide terminal has dots
_RECENT = 100  # steps that the time to go is reckoned from
_HEALTH = {"ok": "green", "warn": "yellow", "crit": "bold red"}
_BORDERS = {"ok": "green", "warn": "yellow", "crit": "red"}
_WIDE, _NARROW = 84, 44  # columns inside the frame from which three figures, and two, stand side by side
_LEVELS = {"info": "dim", "warn": "yellow", "crit": "bold red"}


class Curve:
    """A curve in bounded memory: when it grows too long, neighbours become one point at their mean."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._every = 1
        self._open: list[tuple[float, float]] = []

    def add(self, x: float, y: float) -> None:
        if not math.isfinite(y):
            return
        self._open.append((x, y))
        if len(self._open) == self._every:
            self.points.append(_mean(self._open))
            self._open = []
        if len(self.points) >= 2 * _POINTS:
            self.points = [_mean(self.points[i : i + 2]) for i in range(0, len(self.points), 2)]
            self._every *= 2


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _same_file(one: Any, other: Any) -> bool:
    """Whether two streams write to one descriptor: an import may have put another object in the place of sys.stderr
    since the log's handler was made."""
    try:
        return one is other or one.fileno() == other.fileno()
    except (AttributeError, OSError, ValueError):  # no descriptor
        return False


class _Framed:
    """The view as the terminal is wide, whatever is printed above it: a line that is printed unwrapped would leave the
    view's own unwrapped too, longer than the terminal, and their number not what is wiped before the next drawing.
    Below it a line is free for what the terminal itself writes, such as ^C."""

    def __init__(self, view: RenderableType) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(Group(self._view, Text()), options.update(no_wrap=False, overflow="fold"))


class LiveView:
    """Fed with the run's records; draws itself once a second. transient: nothing of it stays when it ends."""

    def __init__(
        self, console: Console, title: str, total_steps: int, start_step: int, transient: bool = False
    ) -> None:
        self._title, self._total, self._start = title, total_steps, start_step
        self._began = time.time()
        self._record: StepRecord | None = None
        self._doing = ""
        self._loss, self._eval = Curve(), Curve()
        self._best: tuple[float, int] | None = None
        self._last_eval: float | None = None
        self._times: deque[tuple[int, float]] = deque([(start_step, self._began)], maxlen=_RECENT)
        self._events: deque[Text] = deque(maxlen=4)
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=1, transient=transient)
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []  # with their own streams

    def start(self) -> None:
        stream = sys.stderr
        self._live.start()
        # The log's lines go above the view, as print's do; its handlers hold the stream itself.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and _same_file(handler.stream, stream):
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def stop(self) -> None:
        self._live.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """What an earlier start of the run recorded."""
        for record in records:
            if record["kind"] == "step" and record["loss"] is not None:
                self._loss.add(record["step"], record["loss"])
            elif record["kind"] == "eval" and record["loss"] is not None:
                self.evaluation(record["step"], record["loss"])

    def step(self, record: StepRecord) -> None:
        self._record = record
        self._loss.add(record.step, record.loss)
        self._times.append((record.step, record.time))

    def evaluation(self, step: int, loss: float) -> None:
        self._eval.add(step, loss)
        self._last_eval = loss
        if math.isfinite(loss) and (self._best is None or loss < self._best[0]):
            self._best = loss, step

    def progress(self, text: str) -> None:
        """What is being done between two steps, such as `Evaluating 37/193`; empty when it is over."""
        self._doing = text

    def event(self, event: Event) -> None:
        text = f"step {event.step}: {event.rule}: {event.reason}" + (f" → {event.action}" if event.action else "")
        self._events.append(Text(text, style=_LEVELS[event.level], no_wrap=True, overflow="ellipsis"))

    # --- Drawing ---

    def render(self) -> RenderableType:
        return _Framed(self._panel())

    def _panel(self) -> Panel:
        record = self._record
        if record is None:
            return self._frame(Text("waiting for the first step …", style="dim"))
        width = max(20, self._live.console.width - 4)
        rows: list[RenderableType] = [self._progress(record), self._figures(record, width)]
        curves = plot(((self._loss.points, "blue"), (self._eval.points, "bold dark_orange")), width, 8)
        if curves:
            rows += [Text.assemble(("⠤ training loss  ", "blue"), ("⠤ evaluation loss", "dark_orange")), *curves]
        rows += self._events
        return self._frame(Group(*rows), border_style=_BORDERS[record.health.level])

    def _frame(self, inside: RenderableType, **style: Any) -> Panel:
        """What is being done stands in the lower border, so that the view's height does not change with it."""
        doing = f"[bold]{escape(self._doing)}[/bold]" if self._doing else None
        title = escape(self._title)
        return Panel(inside, title=title, title_align="left", subtitle=doing, subtitle_align="left", **style)

    def _progress(self, record: StepRecord) -> Table:
        epochs = max(1, math.ceil(self._total / record.batches))
        bars = Table.grid(padding=(0, 1), expand=True)
        bars.add_column(no_wrap=True)
        bars.add_column(ratio=1)
        bars.add_column(no_wrap=True, justify="right")
        gone, to_go = timedelta(seconds=int(time.time() - self._began)), self._to_go(record.step)
        ends = f"{gone} gone, " + (f"{timedelta(seconds=int(to_go))} to go" if to_go is not None else "ETA unknown")
        bars.add_row(f"step  {record.step:,}/{self._total:,}", _bar(record.step, self._total), ends)
        share = f"{record.batch / record.batches:.0%} of the epoch"
        bars.add_row(f"epoch {record.epoch}/{epochs}", _bar(record.batch, record.batches), share)
        return bars

    def _to_go(self, step: int) -> float | None:
        """Seconds, at the pace of the last steps with whatever came between them."""
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return (self._total - step) * (ended - began) / (last - first) if last > first else None

    def _figures(self, record: StepRecord, width: int) -> Table:
        """Three figures to a row, two or one, as `width` characters have room."""
        evaluated = "none yet" if self._last_eval is None else f"{self._last_eval:.4f}"
        best = "" if self._best is None else f"{self._best[0]:.4f} at {self._best[1]:,}"
        columns = 3 if width >= _WIDE else 2 if width >= _NARROW else 1
        supervised = record.supervised_tokens_per_s
        mfu = "" if record.mfu is None else f", MFU {record.mfu:.1%}"
        supervised_rate = "" if supervised is None else f" ({supervised:,.0f} supervised)"
        memory = f"{record.memory / _GIB:.1f}/{record.memory_total / _GIB:.1f} GiB"
        figures = [(figure_label(name), record.shown(value, 4)) for name, value in record.of_objective.items()]
        short = [
            ("Loss", record.shown(record.loss, 4)),
            *([] if figures else [("PPL", record.shown(record.ppl, 2))]),
            ("LR", f"{record.lr:.2e}"),
            ("GradNorm", f"{record.grad_norm:.3f}"),
            (record.memory_kind, memory),
            *figures,
        ]
        long: list[tuple[str, str | Text]] = [
            *([("Eval", evaluated), ("Best", best)] if best and columns < 3 else []),
            *([] if best and columns < 3 else [("Eval", evaluated + (f" (best {best})" if best else ""))]),
            ("Tokens/s", f"{record.tokens_per_s:,.0f}{supervised_rate}{mfu}"),
            ("Step", self._split(record)),
            ("Health", Text(str(record.health), _HEALTH[record.health.level])),
        ]
        return _grid(short, long, columns)

    @staticmethod
    def _split(record: StepRecord) -> str:
        """The two phases that take most of a step's time, and the exchange of ranks that share rows."""
        split = record.seconds or {}
        whole = sum(split.values())
        if not whole:
            return ""
        most = sorted(split.items(), key=lambda item: -item[1])[:2]
        most += [(name, value) for name, value in split.items() if name == "exchange" and (name, value) not in most]
        return ", ".join(f"{value / whole:.0%} {name}" for name, value in most)


def _bar(done: int, total: int) -> ProgressBar:
    return ProgressBar(total=total, completed=done, complete_style="blue", finished_style="green")


def _grid(short: Sequence[tuple[str, str]], long: Sequence[tuple[str, str | Text]], columns: int) -> Table:
    """Labels and values in that many columns, the long ones in the last; what has no room is cut with an ellipsis."""
    grid = Table.grid(padding=(0, 2), expand=False)
    for column in range(columns):
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(no_wrap=column < columns - 1)  # the last gives way
    beside = columns - 1
    rows = max(-(-(len(short) + len(long)) // columns), len(long))
    short, rest = short[: rows * beside], short[rows * beside :]
    last = [*long, *rest] if beside else [*rest, *long]
    for row in range(rows):
        pairs: list[tuple[str, str | Text]] = [*short[row * beside : (row + 1) * beside]]
        pairs += [("", "")] * (columns - 1 - len(pairs)) + [*last[row : row + 1]]
        grid.add_row(*(_one_line(cell) for pair in pairs for cell in pair))
    return grid


def _one_line(cell: str | Text) -> Text:
    text = Text(cell) if isinstance(cell, str) else cell
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
