"""Machine observations for the health rules: free disk, GPU temperature, throttling and memory errors.

A thread measures, because asking a network file system for its free space can take as long as it likes.
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lumina.config import VisibleGpu, open_nvml, visible_gpus
from lumina.train.health.observations import GpuFigures, MachineObservation

_SECONDS = 20.0
# NVML's clock-event reasons that mean trouble; those that are ordinary (idle, the user's own clocks) are left out.
_REASONS = {0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}


class MachineWatch:
    """Measures every 20 seconds in a thread, until closed. `checkpoint_bytes`: what a checkpoint takes on those
    disks."""

    def __init__(self, folders: Sequence[Path], checkpoint_bytes: int, seconds: float = _SECONDS) -> None:
        self._folders, self._checkpoint_bytes, self._seconds = folders, checkpoint_bytes, seconds
        self._nvml = open_nvml()
        self._gpus: list[VisibleGpu] = []
        if self._nvml is not None:
            with suppress(Exception):  # a driver that does not answer must not stop a run
                self._gpus = visible_gpus(self._nvml)
        self._found = deque[MachineObservation](maxlen=1)  # taken by one thread while another measures
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lumina-machine", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            free = {}
            for folder in self._folders:
                with suppress(OSError):
                    free[str(folder)] = shutil.disk_usage(folder).free
            gpus = []
            for gpu in self._gpus:
                with suppress(Exception):  # a GPU that fell off the bus must not end the thread
                    gpus.append(_gpu(self._nvml, gpu.index, gpu.handle))
            self._found.append(MachineObservation(free, self._checkpoint_bytes, tuple(gpus)))
            if self._closed.wait(self._seconds):
                return

    def latest(self) -> MachineObservation | None:
        """What was measured since the last call, None for nothing new."""
        with suppress(IndexError):
            return self._found.pop()
        return None

    def close(self) -> None:
        self._closed.set()


def _gpu(nvml: Any, index: int, handle: Any) -> GpuFigures:
    temperature = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    reasons, errors = 0, 0
    with suppress(nvml.NVMLError):
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    with suppress(nvml.NVMLError):  # cards without ECC
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    slowed = ", ".join(text for bit, text in _REASONS.items() if reasons & bit)
    return GpuFigures(index, temperature, slowed, errors)
