"""The machine's observations: free space of the watched folders, and the GPUs as NVML describes them."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from lumina.config import open_nvml
from lumina.train.health import GpuFigures, MachineObservation, MachineWatch


class Nvml(ModuleType):
    """Two cards as NVML has them: the second is hot, held down by its power limit, and has no ECC memory."""

    NVML_TEMPERATURE_GPU, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 0, 1, 0

    class NVMLError(Exception):
        """As pynvml's."""

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return (60, 91)[handle]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return (0x1, 0x80 | 0x20)[handle]  # idle is no trouble

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return 4


def first(watch: MachineWatch) -> MachineObservation:
    deadline = time.monotonic() + 60
    while (found := watch.latest()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watch.close()
    return found


def test_disks_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() is None
    missing = tmp_path / "not there"
    found = first(MachineWatch([tmp_path, missing], 1000))
    assert set(found.free) == {str(tmp_path)}
    assert found.free[str(tmp_path)] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert (found.checkpoint_bytes, found.gpus) == (1000, ())


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    watch = MachineWatch([tmp_path], 1000)
    assert first(watch).gpus == (GpuFigures(0, 60, "", 4), GpuFigures(1, 91, "software thermal, power brake", 0))
    assert watch.latest() is None  # nothing new


def test_a_driver_that_does_not_answer_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Nvml("pynvml")
    broken.nvmlInit = lambda: (_ for _ in ()).throw(Nvml.NVMLError("Driver Not Loaded"))  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert open_nvml() is None
    assert first(MachineWatch([tmp_path], 1)).gpus == ()
