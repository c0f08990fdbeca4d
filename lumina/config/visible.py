"""Visible devices: which one a rank computes on, and which physical GPUs they are.

CUDA numbers the devices that CUDA_VISIBLE_DEVICES leaves, from 0; NVML and nvidia-smi number all that the container
has. A launcher may show every rank all of a node's GPUs (torchrun, DeepSpeed, `lumina launch`), or each rank its own
alone (`srun --gpus-per-task=1`, a Kubernetes pod for each rank): then that one is number 0 on every rank.

On a machine of unequal GPUs CUDA counts the fastest first and NVML by bus, so that plain numbers agree only under
CUDA_DEVICE_ORDER=PCI_BUS_ID; UUIDs always do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from lumina.config.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def device_of(local_rank: int, local_world: int, devices: int) -> int:
    """The index of a rank's device among the `devices` that it sees, of `local_world` ranks on its machine.

    Raises:
        UserError: fewer devices than ranks, on every rank alike, so that none waits for another.
    """
    if devices == 1:
        return 0
    if devices < local_world:
        raise UserError(
            f"{local_world} ranks on this machine, and each sees {devices} GPUs (this is local rank {local_rank})",
            f"Start {devices} ranks here, or show each rank its own GPU alone (srun --gpus-per-task=1); see {VISIBLE}.",
        )
    return local_rank


def take_device(
    local_rank: int, local_world: int, devices: int, environment: MutableMapping[str, str] = os.environ
) -> int:
    """`device_of`, also set as LOCAL_RANK for DeepSpeed: version 0.19.8 takes LOCAL_RANK for the device's index
    wherever it needs one (the process group, the engine, zero.Init) and asserts that Open MPI's variable says the
    same."""
    index = device_of(local_rank, local_world, devices)
    if index != local_rank:
        environment["LOCAL_RANK"] = str(index)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
            environment["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
    return index


def explain_duplicate(error: Exception, devices: int, local_world: int) -> UserError | None:
    """NCCL's refusal of two ranks on one GPU, in words of what the user can do; None for another error."""
    if "Duplicate GPU" not in str(error):  # torch hands NCCL's text on and no code of it
        return None
    return UserError(
        f"{local_world} ranks on this machine share a GPU: each sees {devices}, and it is the same one",
        "Start one rank for each GPU, or let the launcher show each rank another one (srun --gpus-per-task=1).",
    )


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU that this process may use. `index`: NVML's, as nvidia-smi shows it; `handle`: NVML's handle of the card;
    `share`: that of the MIG instance that is visible of it, else the card's again."""

    index: int
    handle: Any
    share: Any


def visible_names(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names, in order, up to the first that can be no device, as CUDA reads it (a negative
    number, a name twice); None where it is not set and everything is visible."""
    text = environment.get(VISIBLE)
    if text is None:
        return None
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name in names or not (name.isdecimal() or name.startswith(("GPU-", "MIG-"))):
            break
        names.append(name)
    return names


def usable_cpus() -> set[int]:
    """The CPUs that this process may run on, by the kernel's numbers; where that cannot be asked, all of them."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def open_nvml() -> Any | None:
    """The pynvml module, initialised; None without the package, a driver or a GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml


def visible_gpus(nvml: Any, environment: Mapping[str, str] = os.environ) -> list[VisibleGpu]:
    """The visible GPUs in CUDA's order. `nvml`: from `open_nvml`."""
    every = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    names = visible_names(environment)
    if names is None:
        return [VisibleGpu(index, handle, handle) for index, handle in enumerate(every)]
    found = []
    for name in names:
        gpu = _named(nvml, name, every)
        if gpu is None:  # CUDA sees nothing from here on
            break
        found.append(gpu)
    return found


def _named(nvml: Any, name: str, every: list[Any]) -> VisibleGpu | None:
    if name.isdecimal():
        index = int(name)
        return VisibleGpu(index, every[index], every[index]) if index < len(every) else None
    if name.startswith("GPU-"):  # its beginning is enough, where no other begins like it
        matching = [index for index, handle in enumerate(every) if _uuid(nvml, handle).startswith(name)]
        return VisibleGpu(matching[0], every[matching[0]], every[matching[0]]) if len(matching) == 1 else None
    try:
        share = nvml.nvmlDeviceGetHandleByUUID(name)
        uuid = _uuid(nvml, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(share))
    except nvml.NVMLError:
        return None
    at = next((index for index, handle in enumerate(every) if _uuid(nvml, handle) == uuid), None)
    return None if at is None else VisibleGpu(at, every[at], share)


def _uuid(nvml: Any, handle: Any) -> str:
    uuid = nvml.nvmlDeviceGetUUID(handle)
    return uuid.decode() if isinstance(uuid, bytes) else str(uuid)
