"""System metrics: processor, memory, disk, network and GPUs of rank 0's node, by a thread."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lumina.config import open_nvml, visible_gpus


class System:
    """Measures since the last call. Figures: cpu in percent of all cores, process_cpu in percent of one; bytes of
    memory and disk; bytes a second of disk_read, disk_write, net_sent and net_received; gpu<i>/ (i is nvidia-smi's
    number of a GPU that is visible to the run) with utilisation in percent, memory in bytes, temperature in degrees
    Celsius and power in watts, where NVML is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self._gpus = _gpus()
        self._before = self._counters()
        self._process.cpu_percent()
        psutil.cpu_percent()

    def _counters(self) -> tuple[float, dict[str, int]]:
        counts: dict[str, int] = {}
        with suppress(OSError, RuntimeError):  # containers without /proc/diskstats
            disk = psutil.disk_io_counters()
            if disk is not None:
                counts |= {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
        with suppress(OSError, RuntimeError):
            net = psutil.net_io_counters()
            if net is not None:
                counts |= {"net_sent": net.bytes_sent, "net_received": net.bytes_recv}
        return time.monotonic(), counts

    def measure(self) -> dict[str, Any]:
        before, self._before = self._before, self._counters()
        (began, earlier), (now, later) = before, self._before
        memory = psutil.virtual_memory()
        values: dict[str, Any] = {
            "time": time.time(),
            "cpu": psutil.cpu_percent(),
            "process_cpu": self._process.cpu_percent(),
            "memory": memory.used,
            "memory_available": memory.available,
            "process_memory": self._process.memory_info().rss,
        }
        with suppress(OSError):
            values["disk_free"] = shutil.disk_usage(self._folder).free
        for name, count in later.items():
            if name in earlier and now > began:
                values[name] = round(max(0, count - earlier[name]) / (now - began))
        for number, gpu in self._gpus.items():
            with suppress(Exception):  # a GPU that fell off the bus must not end the thread
                values[f"gpu{number}"] = gpu()
        return values


def _gpus() -> dict[int, Callable[[], dict[str, float]]]:
    """A measurer for each visible GPU, by its number in nvidia-smi."""
    nvml = open_nvml()
    if nvml is None:
        return {}

    def measurer(handle: Any, share: Any) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            return {
                "utilisation": nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                "memory": int(nvml.nvmlDeviceGetMemoryInfo(share).used),
                "temperature": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                "power": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            }

        return measure

    return {gpu.index: measurer(gpu.handle, gpu.share) for gpu in visible_gpus(nvml)}


class Sampler:
    """Calls `record` with the system's figures every `seconds`, from a thread, until closed."""

    def __init__(self, folder: Path, seconds: float, record: Callable[[dict[str, Any]], None]) -> None:
        self._folder, self._seconds, self._record = folder, seconds, record
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="lumina-system", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        system = System(self._folder)
        while not self._stop.wait(self._seconds):
            self._record(system.measure())

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
