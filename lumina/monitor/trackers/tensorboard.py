"""TensorBoard event files in RUN/tensorboard."""

from __future__ import annotations

import time as clock
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lumina.files import read_text, write_text
from lumina.monitor.tracking import GROUPS, RunInfo

_SECONDS_BETWEEN_FLUSHES = 5.0


class TensorBoard:
    """Each start writes a file of its own, which tells readers to forget the steps that are taken again.

    What a killed process had not flushed is not in its file. `complete` in the folder holds the step up to which
    everything is; a new start purges what is later and writes it again.
    """

    def open(self, run: RunInfo) -> Mapping[str, int]:
        self._folder = run.folder / "tensorboard"
        self._mark = self._folder / "complete"
        complete = 0
        with suppress(FileNotFoundError, ValueError):
            complete = min(int(read_text(self._mark)), run.step)
        self._writer = self._start(complete)
        self._flushed = clock.monotonic()
        settings = "\n".join(f"    {name}: {value}" for name, value in run.config.items())  # Markdown's verbatim
        self._writer.add_text("config", settings, complete)
        return dict.fromkeys(GROUPS.values(), complete)

    def _start(self, complete: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=complete + 1)

    def scalars(self, group: str, step: int, values: Mapping[str, float], time: float | None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step, walltime=time)
        if group == "train" and clock.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._flush(step - 1)  # this step's evaluation may still come

    def _flush(self, complete: int) -> None:
        self._writer.flush()
        write_text(self._mark, str(complete))
        self._flushed = clock.monotonic()

    def text(self, name: str, step: int, text: str) -> None:
        self._writer.add_text(name, text, step)

    def rewind(self, step: int) -> bool:
        self._writer.close()
        write_text(self._mark, str(step))
        self._writer = self._start(step)
        return True

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """Nothing to end: it has no process of its own."""


TRACKER = TensorBoard
