"""Hardware topology of a machine: cores by NUMA node, GPUs and how they are joined, network interfaces.

Read from Linux's sysfs (another root can be given) and, for GPUs, from NVML where there is one. Nothing is chosen in
silence: the interface and the cores of every rank are printed when a job starts.
"""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lumina.config import UserError, VisibleGpu, open_nvml, usable_cpus, visible_gpus

_ETHERNET, _LOOPBACK, _INFINIBAND = 1, 772, 32  # /sys/class/net/*/type (linux/if_arp.h)
_NAMESPACES = ("net", "pid", "mnt", "uts")
_KINDS = {_ETHERNET: "ethernet", _LOOPBACK: "loopback", _INFINIBAND: "infiniband"}


@dataclass(frozen=True)
class Core:
    """A physical core: the CPUs (hardware threads) it offers that this process may use."""

    numa: int
    package: int
    number: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Interface:
    """speed in Mb/s, 0 where unknown; kind is ethernet, infiniband, loopback or other."""

    name: str
    address: str
    kind: str
    speed: int = 0


@dataclass(frozen=True)
class Gpu:
    """A visible GPU; index is NVML's, as nvidia-smi has it; numa is -1 where unknown; memory in bytes; clock is the
    highest SM clock in MHz."""

    index: int
    name: str
    memory: int
    numa: int = -1
    clock: int = 0
    nvlinks: int = 0


@dataclass
class Node:
    """A machine. `gpus` are those that this process sees, in CUDA's order; `infiniband` lists the adapters' active
    ports, like mlx5_0:1 (100 Gb/sec)."""

    name: str
    cores: list[Core]
    interfaces: list[Interface]
    gpus: list[Gpu] = field(default_factory=list)
    infiniband: list[str] = field(default_factory=list)

    @property
    def numa_nodes(self) -> int:
        return len({core.numa for core in self.cores})

    @property
    def interconnect(self) -> str | None:
        """NVLink where every GPU has links, PCIe otherwise; None with fewer than two GPUs."""
        if len(self.gpus) < 2:
            return None
        return "NVLink" if all(gpu.nvlinks for gpu in self.gpus) else "PCIe"

    def summary(self, interface: Interface | None = None) -> str:
        """One line about the machine, with the interface chosen."""
        parts = [f"{len(self.cores)} cores on {self.numa_nodes} NUMA node(s)"]
        if self.gpus:
            link = f" over {self.interconnect}" if self.interconnect else ""
            parts.append(f"{len(self.gpus)} x {self.gpus[0].name}{link}")
        if self.infiniband:
            parts.append(f"InfiniBand {', '.join(self.infiniband)}")
        if interface is not None:
            speed = f", {interface.speed} Mb/s" if interface.speed > 0 else ""
            parts.append(f"ranks talk over {interface.name} ({interface.address}, {interface.kind}{speed})")
        return "; ".join(parts)


# --- Reading --------------------------------------------------------------------------------------


def read(sys_root: Path = Path("/sys"), allowed: set[int] | None = None) -> Node:
    """This machine, or the one that a copy of sysfs describes. `allowed`: the CPUs that this process may use."""
    if allowed is None:
        allowed = usable_cpus()
    return Node(socket.gethostname(), _cores(sys_root, allowed), _interfaces(sys_root), _gpus(), _infiniband(sys_root))


def parse_cpulist(text: str) -> list[int]:
    """Linux's CPU list format: 0-3,8,10-11."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    return cpus


def _text(path: Path, default: str = "") -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return default


def _cores(root: Path, allowed: set[int]) -> list[Core]:
    numa_of = {}
    for node in (root / "devices/system/node").glob("node[0-9]*"):
        for cpu in parse_cpulist(_text(node / "cpulist")):
            numa_of[cpu] = int(node.name[4:])
    found: dict[tuple[int, int, int], list[int]] = {}
    for cpu in sorted(allowed):
        folder = root / f"devices/system/cpu/cpu{cpu}/topology"
        package = int(_text(folder / "physical_package_id", "0"))
        number = int(_text(folder / "core_id", str(cpu)))  # a machine that hides its cores has one for each CPU
        found.setdefault((numa_of.get(cpu, 0), package, number), []).append(cpu)
    return [Core(*key, tuple(cpus)) for key, cpus in sorted(found.items())]


def _interfaces(root: Path) -> list[Interface]:
    addresses = {
        name: next((a.address for a in found if a.family == socket.AF_INET), "")
        for name, found in psutil.net_if_addrs().items()
    }
    interfaces = []
    for name, address in addresses.items():
        folder = root / "class/net" / name
        kind = _KINDS.get(int(_text(folder / "type", "0") or 0), "other")
        speed = int(_text(folder / "speed", "0") or 0)
        if address:
            interfaces.append(Interface(name, address, kind, max(speed, 0)))
    return interfaces


def _infiniband(root: Path) -> list[str]:
    ports = []
    for port in sorted((root / "class/infiniband").glob("*/ports/*")):
        if "ACTIVE" in _text(port / "state"):
            ports.append(f"{port.parent.parent.name}:{port.name} ({_text(port / 'rate', 'rate unknown')})")
    return ports


def _gpus() -> list[Gpu]:
    nvml = open_nvml()
    if nvml is None:
        return []
    try:
        return [_gpu(nvml, found) for found in visible_gpus(nvml)]
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, visible: VisibleGpu) -> Gpu:
    handle = visible.handle
    name = nvml.nvmlDeviceGetName(handle)
    bus = nvml.nvmlDeviceGetPciInfo(handle).busId
    bus = (bus.decode() if isinstance(bus, bytes) else bus).lower()[-12:]
    links = 0
    for link in range(18):  # NVLINK_MAX_LINKS
        try:
            links += int(nvml.nvmlDeviceGetNvLinkState(handle, link))
        except nvml.NVMLError:
            break
    return Gpu(
        visible.index,
        name.decode() if isinstance(name, bytes) else name,
        int(nvml.nvmlDeviceGetMemoryInfo(visible.share).total),
        int(_text(Path(f"/sys/bus/pci/devices/{bus}/numa_node"), "-1")),
        int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        links,
    )


def machine_identity() -> str:
    """The same for two processes on one machine, whatever its name; containers that share a machine have one each. A
    node of Slurm is told by its name there, since tests run several on one machine."""
    spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in _NAMESPACES if Path(f"/proc/self/ns/{kind}").exists()]
    boot = _text(Path("/proc/sys/kernel/random/boot_id"), str(uuid.getnode()))
    return " ".join([boot, *spaces, socket.gethostname(), os.environ.get("SLURMD_NODENAME", "")])


# --- Choosing -------------------------------------------------------------------------------------


def choose_interface(node: Node, peer: str) -> Interface:
    """The interface over which this machine reaches `peer`, by the routing table; GLOO_SOCKET_IFNAME or
    NCCL_SOCKET_IFNAME in the environment say otherwise (NCCL's `=` for an exact name is understood; its `^` names what
    not to use, and leaves the choice to the routing table).

    Raises UserError when that one does not exist or `peer` has no address.
    """
    wanted = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME")
    if wanted and not wanted.startswith("^"):
        named = next((i for i in node.interfaces if i.name == wanted.split(",")[0].lstrip("=")), None)
        if named is None:
            known = ", ".join(i.name for i in node.interfaces)
            raise UserError(f"there is no interface {wanted} on {node.name}", f"Choose one of: {known}.")
        return named
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))  # a UDP socket sends nothing by connecting
            address = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"{node.name} finds no way to {peer}: {error}", "Check the name in /etc/hosts or DNS."
        ) from None
    return next((i for i in node.interfaces if i.address == address), Interface("lo", address, "loopback"))


def binding(node: Node, local_world: int) -> list[list[int]]:
    """The CPUs of each local rank: whole cores, next to each other, within one NUMA node where the numbers allow. With
    a GPU for each rank, cores of the GPU's own NUMA node. More ranks than cores share them in turn."""
    cores = node.cores
    if local_world > len(cores):
        return [list(cores[rank % len(cores)].cpus) for rank in range(local_world)]
    homes = [gpu.numa for gpu in node.gpus[:local_world]]
    if len(homes) == local_world and all(any(core.numa == home for core in cores) for home in homes):
        groups = [_share([c for c in cores if c.numa == home], homes[:rank].count(home), homes.count(home))
                  for rank, home in enumerate(homes)]  # fmt: skip
        if all(groups):
            return groups
    return [_share(cores, rank, local_world) for rank in range(local_world)]


def _beside(node: Node, local_rank: int, local_world: int) -> list[int]:
    """The CPUs of a rank that is shown its own GPU alone: a share of the cores of that GPU's NUMA node. Where the other
    ranks' GPUs are cannot be seen from here; as many as on any NUMA node are taken to be on this one, in order."""
    home = [core for core in node.cores if core.numa == node.gpus[0].numa] or node.cores
    parts = -(-local_world * len(home) // len(node.cores))
    return _share(home, local_rank % parts, parts) or sorted(cpu for core in home for cpu in core.cpus)


def _share(cores: list[Core], index: int, parts: int) -> list[int]:
    own = cores[len(cores) * index // parts : len(cores) * (index + 1) // parts]
    return sorted(cpu for core in own for cpu in core.cpus)


def bind(local_rank: int, local_world: int, node: Node | None = None) -> tuple[list[int], int]:
    """Bind this process to its CPUs. Returns them and the number of physical cores among them: its threads."""
    node = node or read()
    alone = len(node.gpus) == 1 < local_world
    own = _beside(node, local_rank, local_world) if alone else binding(node, local_world)[local_rank]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own)
    return own, max(1, sum(1 for core in node.cores if set(core.cpus) <= set(own)))


def rank_map(nodes: list[tuple[str, int]]) -> list[str]:
    """Lines that say which ranks are where, for (host, ranks on it) in rank order."""
    lines, first = [], 0
    for host, count in nodes:
        ranks = f"rank {first}" if count == 1 else f"ranks {first}-{first + count - 1}"
        lines.append(f"{host}: {ranks}")
        first += count
    return lines


def recommended(nodes: int, gpus_per_node: int, weights: float, memory: float) -> dict[str, Any]:
    """ZeRO settings that suit the shape of a cluster, for a model whose weights take `weights` bytes (16-bit) on GPUs
    with `memory` bytes.

    16-bit weights and gradients, float32 weights and two moments are 8 times the weights. Where a node's GPUs hold a
    second copy of the weights among them, ZeRO++'s hpZ (arXiv:2306.10209) keeps the gathers of ZeRO-3's backward pass
    on the links inside the node.
    """
    room, ranks = 0.6 * memory, nodes * gpus_per_node  # the rest is for activations
    if 8 * weights <= room:
        return {"stage": 1 if ranks > 1 else 0}
    if 2 * weights + 6 * weights / ranks <= room:
        return {"stage": 2}
    sharded = 8 * weights / ranks
    if nodes > 1 and gpus_per_node > 1 and sharded + weights / gpus_per_node <= room:
        return {"stage": 3, "zero_hpz_partition_size": gpus_per_node}
    return {"stage": 3} if sharded <= room else {"stage": 3, "offload_optimizer": {"device": "cpu"}}
