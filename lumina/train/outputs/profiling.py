"""--profile: a trace of a few early steps by torch's profiler, and the ten operations that took the longest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import profiler

from lumina.files import write_text

log = logging.getLogger("lumina")

_SKIPPED, _WARM, _TRACED = 2, 1, 3  # the first steps allocate and compile


class Profile:
    """Call `step` after every step. RUN/profile gets `step-N.trace.json.gz`, for chrome://tracing or Perfetto, and
    `step-N.txt`, the table. A run of fewer than six steps leaves none, nor does a start that `may_write` no more."""

    def __init__(self, folder: Path, start_step: int, may_write: Callable[[], bool] = lambda: True) -> None:
        self._folder, self._may_write = folder / "profile", may_write
        self._last = start_step + _SKIPPED + _WARM + _TRACED
        activities = [profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(profiler.ProfilerActivity.CUDA)
        self._profiler: Any = profiler.profile(
            activities=activities,
            schedule=profiler.schedule(wait=_SKIPPED, warmup=_WARM, active=_TRACED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profiler.start()

    def step(self) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, traced: Any) -> None:
        if not self._may_write():  # the folder is another start's by now
            return
        try:
            self._folder.mkdir(exist_ok=True)
            name = f"step-{self._last:08d}"
            traced.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
            table = top_operations(traced)
            write_text(self._folder / f"{name}.txt", table + "\n")
            log.info("profile of %d steps in %s\n%s", _TRACED, self._folder, table)
        except OSError as error:
            log.warning("the profile could not be written: %s", error)

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def top_operations(traced: Any, count: int = 10) -> str:
    """The operations that took longest in themselves: on the GPU where there is one, else on the CPU."""
    on_gpu = torch.cuda.is_available()
    unit = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(traced.key_averages(), key=lambda row: getattr(row, unit), reverse=True)
    rows = [row for row in rows if not row.key.startswith("ProfilerStep")]
    whole = sum(getattr(row, unit) for row in rows) or 1
    lines = [f"{'operation':<56} {'calls':>7} {'ms':>10} {'share':>6}"]
    for row in rows[:count]:
        spent = getattr(row, unit)
        lines.append(f"{row.key[:56]:<56} {row.count:>7} {spent / 1000:>10.2f} {spent / whole:>6.1%}")
    return "\n".join(lines)
