"""Devices and clusters: peak rates, memory and links from `devices.yaml`, where each figure has its source."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from lumina.config import VISIBLE, UserError, did_you_mean, visible_names
from lumina.plan.costs.launches import LaunchCost


@dataclass(frozen=True)
class Device:
    """One accelerator. memory in bytes; bandwidth, link and network in bytes/s; peak in FLOP/s by precision; matmul and
    attention are the shares of peak that those products reach; uncertainty: of a predicted rate, either way; power in
    W."""

    name: str
    memory: float
    bandwidth: float
    peak: dict[str, float]
    link: float
    network: float | None
    power: float
    matmul: float
    attention: float
    uncertainty: float
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines with `gpus_per_node` devices each; `launch_cost`: how fast one of their cores queues
    kernels."""

    device: Device
    nodes: int = 1
    gpus_per_node: int = 1
    launch_cost: LaunchCost = field(default_factory=LaunchCost)

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        size = f"{self.nodes} x {self.gpus_per_node}" if self.nodes > 1 else str(self.gpus_per_node)
        return f"{size} {self.device.name}"


@functools.cache
def _table() -> dict[str, Any]:
    text = resources.files("lumina.plan.costs").joinpath("devices.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return table


def device_names() -> list[str]:
    """The devices that are known."""
    return list(_table()["devices"])


def find_device(name: str) -> Device:
    """The device of that name (also the maker's product name); UserError when it is not in the table."""
    wanted = _plain(name)
    for key, entry in _table()["devices"].items():
        if wanted in {_plain(word) for word in (key, *entry["names"])}:
            return _device(key, entry)
    for key, why in _table()["refused"].items():
        if wanted.split("-")[0] == key or wanted.removeprefix("tesla-").split("-")[0] == key:
            raise UserError(f"no estimate for {name}: {why}", "On the machine itself, --measure times real steps.")
    hint = did_you_mean(name.lower(), device_names())
    raise UserError(
        f"no figures are known for the device `{name}`.{hint}",
        f"Known: {', '.join(device_names())}. On the machine itself, --measure times real steps instead.",
    )


def local_device() -> Device | None:
    """The first visible GPU of this machine as nvidia-smi names it, without torch; None when there is none or it is not
    known (an instance of a divided GPU is not: the table has whole ones)."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
        listed = [line.split(", ", 1) for line in answer.stdout.splitlines()]
        first = (visible_names() or ["none"])[0] if VISIBLE in os.environ else "0"
        if first.isdecimal():
            return find_device(listed[int(first)][1])
        return find_device(next(name for uuid, name in listed if uuid.startswith(first)))
    except (subprocess.SubprocessError, UserError, IndexError, OSError, StopIteration, ValueError):
        return None


def _plain(name: str) -> str:
    return name.lower().replace("nvidia", "").replace(" ", "-").replace("_", "-").strip("-")


def _device(key: str, entry: dict[str, Any]) -> Device:
    reached = _table()["architectures"][entry["architecture"]]
    return Device(
        name=key,
        memory=entry["memory"] * 1e9,
        bandwidth=entry["bandwidth"] * 1e9,
        peak={dtype: tera * 1e12 for dtype, tera in entry["peak"].items()},
        link=entry["link"] * 1e9,
        network=None if entry["network"] is None else entry["network"] * 1e9 / 8,
        power=entry["power"],
        matmul=reached["matmul"]["share"],
        attention=reached["attention"]["share"],
        uncertainty=reached["uncertainty"],
        sources=(entry["source"], reached["matmul"]["source"], reached["attention"]["source"]),
    )
