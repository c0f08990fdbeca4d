"""Which device a rank takes and which physical GPUs are visible, over an NVML made of Python objects."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from lumina.config import UserError
from lumina.config.visible import device_of, explain_duplicate, take_device, usable_cpus, visible_gpus, visible_names


class NVMLError(Exception):
    pass


def nvml(count: int, mig: dict[str, int] | None = None) -> Any:
    """NVML with `count` cards, whose handles are their UUIDs; `mig`: the card of each instance."""
    shares = mig or {}
    uuids = [f"GPU-{index:04d}-abc" for index in range(count)]

    def by_uuid(name: str) -> str:
        if name not in shares:
            raise NVMLError(name)
        return name

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: uuids[index],
        nvmlDeviceGetUUID=lambda handle: handle.encode(),  # bytes, as older bindings give them
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda share: uuids[shares[share]],
    )


@pytest.mark.parametrize(
    ("local_rank", "local_world", "devices", "index"),
    [(3, 8, 8, 3), (0, 1, 8, 0), (5, 8, 1, 0), (0, 1, 1, 0), (1, 2, 4, 1)],
)
def test_a_ranks_device(local_rank: int, local_world: int, devices: int, index: int) -> None:
    assert device_of(local_rank, local_world, devices) == index


@pytest.mark.parametrize("local_rank", range(8))
def test_too_few_devices_are_refused_on_every_rank(local_rank: int) -> None:
    with pytest.raises(UserError, match=f"8 ranks on this machine, and each sees 4 GPUs .*local rank {local_rank}"):
        device_of(local_rank, 8, 4)


def test_deepspeed_is_told_the_index() -> None:
    environment = {"LOCAL_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "5", "RANK": "13"}
    assert take_device(5, 8, 8, environment) == 5
    assert environment["LOCAL_RANK"] == "5"
    assert take_device(5, 8, 1, environment) == 0
    assert environment == {"LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "RANK": "13"}


def test_two_ranks_on_one_gpu_are_explained() -> None:
    said = explain_duplicate(RuntimeError("ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0"), 1, 2)
    assert said is not None
    assert "2 ranks on this machine share a GPU" in said.message
    assert explain_duplicate(RuntimeError("connection refused"), 1, 2) is None


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, None),
        ("", []),
        ("2,0", ["2", "0"]),
        ("0,-1,1", ["0"]),
        ("1, 3", ["1", "3"]),
        ("0,0", ["0"]),
        ("NoDevFiles", []),
        ("GPU-ab,MIG-cd", ["GPU-ab", "MIG-cd"]),
    ],
)
def test_names_as_cuda_reads_them(value: str | None, names: list[str] | None) -> None:
    """CUDA C++ programming guide, CUDA_VISIBLE_DEVICES: devices after the first invalid entry are invisible."""
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert visible_names(environment) == names


@pytest.mark.parametrize("value", ["", "0", "2,0", "0,-1,1", "1,x", "GPU-ab,GPU-cd"])
def test_names_are_those_that_torch_reads(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    theirs = torch.cuda._parse_visible_devices()  # type: ignore[no-untyped-call]
    assert [str(name) for name in theirs] == visible_names({"CUDA_VISIBLE_DEVICES": value})


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("3,1", [3, 1]),
        ("", []),
        ("1,9,0", [1]),
        ("GPU-0002,GPU-0000-abc", [2, 0]),
        ("GPU-000", []),  # four begin like it
        ("GPU-0003-abc,GPU-gone", [3]),
        ("MIG-a,MIG-b", [2, 1]),
        ("MIG-gone", []),
    ],
)
def test_physical_gpus(value: str | None, indices: list[int]) -> None:
    library = nvml(4, {"MIG-a": 2, "MIG-b": 1})
    found = visible_gpus(library, {} if value is None else {"CUDA_VISIBLE_DEVICES": value})
    assert [gpu.index for gpu in found] == indices
    assert [gpu.handle for gpu in found] == [f"GPU-{index:04d}-abc" for index in indices]
    if value == "MIG-a,MIG-b":
        assert [gpu.share for gpu in found] == ["MIG-a", "MIG-b"]


def test_usable_cpus_are_those_of_the_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
