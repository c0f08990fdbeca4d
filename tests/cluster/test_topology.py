"""What a machine looks like, from a copy of sysfs and from the real one; what is chosen for it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.cluster import topology
from lumina.cluster.topology import Core, Gpu, Interface, Node, binding, choose_interface, parse_cpulist, recommended
from lumina.config import UserError

# Two packages of two NUMA nodes of two cores of two hardware threads: CPU c and c + 8 are one core.
CORES, THREADS = 8, 2


def write(path: Path, text: str | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for cpu in range(CORES * THREADS):
        core = cpu % CORES
        write(tmp_path / f"devices/system/cpu/cpu{cpu}/topology/physical_package_id", core // 4)
        write(tmp_path / f"devices/system/cpu/cpu{cpu}/topology/core_id", core % 4)
    for node in range(4):
        first = 2 * node
        write(tmp_path / f"devices/system/node/node{node}/cpulist", f"{first}-{first + 1},{first + 8}-{first + 9}")
    for name, kind, speed in (("eth0", 1, "25000"), ("ib0", 32, "100000"), ("lo", 772, ""), ("tun0", 65534, "-1")):
        write(tmp_path / f"class/net/{name}/type", kind)
        write(tmp_path / f"class/net/{name}/speed", speed)
    for port, state in ((1, "4: ACTIVE"), (2, "1: DOWN")):
        write(tmp_path / f"class/infiniband/mlx5_0/ports/{port}/state", state)
        write(tmp_path / f"class/infiniband/mlx5_0/ports/{port}/rate", "100 Gb/sec (4X EDR)")
    addresses: dict[str, Any] = {
        name: [SimpleNamespace(family=socket.AF_INET, address=address)]
        for name, address in (("eth0", "192.0.2.5"), ("ib0", "198.51.100.5"), ("lo", "127.0.0.1"), ("tun0", "10.8.0.2"))
    }
    addresses["eth1"] = [SimpleNamespace(family=socket.AF_PACKET, address="00:00:00:00:00:01")]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    return tmp_path


@pytest.fixture
def node(sysfs: Path) -> Node:
    return topology.read(sysfs, allowed=set(range(CORES * THREADS)))


def test_cores_by_numa_node(node: Node) -> None:
    assert node.numa_nodes == 4
    assert [core.numa for core in node.cores] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [core.package for core in node.cores] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [core.cpus for core in node.cores] == [(c, c + 8) for c in range(8)]


def test_only_allowed_cpus(sysfs: Path) -> None:
    """A container or a Slurm step may have less than the machine."""
    part = topology.read(sysfs, allowed={1, 9, 4})
    assert [(core.numa, core.cpus) for core in part.cores] == [(0, (1, 9)), (2, (4,))]


def test_interfaces_and_infiniband(node: Node) -> None:
    assert {(i.name, i.kind, i.speed) for i in node.interfaces} == {
        ("eth0", "ethernet", 25000), ("ib0", "infiniband", 100000), ("lo", "loopback", 0), ("tun0", "other", 0),
    }  # fmt: skip
    assert node.infiniband == ["mlx5_0:1 (100 Gb/sec (4X EDR))"]


def test_the_line_that_is_printed(node: Node) -> None:
    ib0 = next(i for i in node.interfaces if i.name == "ib0")
    node.gpus = [Gpu(i, "NVIDIA H100", 80 << 30, nvlinks=18) for i in range(2)]
    line = node.summary(ib0)
    for part in ("8 cores on 4 NUMA node(s)", "2 x NVIDIA H100 over NVLink", "InfiniBand mlx5_0:1", "talk over ib0",
                 "198.51.100.5", "100000 Mb/s"):  # fmt: skip
        assert part in line, line
    node.gpus[1] = Gpu(1, "NVIDIA H100", 80 << 30)
    assert node.interconnect == "PCIe"
    node.gpus.pop()
    assert node.interconnect is None


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_get_whole_cores_of_their_own(node: Node, ranks: int) -> None:
    groups = binding(node, ranks)
    assert sorted(cpu for group in groups for cpu in group) == list(range(CORES * THREADS))
    cores = {cpu: core for core in node.cores for cpu in core.cpus}
    for group in groups:
        own = {cores[cpu] for cpu in group}
        assert sorted(cpu for core in own for cpu in core.cpus) == group, "half a core"
        assert len({core.numa for core in own}) == max(1, 4 // ranks), "spread over more NUMA nodes than it must"


@given(st.integers(1, 24), st.integers(1, 40))
def test_binding_is_fair_for_every_number(cores: int, ranks: int) -> None:
    node = Node("n", [Core(c // 4, 0, c, (c, c + cores)) for c in range(cores)], [])
    groups = binding(node, ranks)
    assert len(groups) == ranks
    assert all(groups)
    used = [cpu for group in groups for cpu in group]
    if ranks <= cores:
        assert sorted(used) == list(range(2 * cores))
    shares = [len(group) for group in groups] if ranks <= cores else [used.count(cpu) for cpu in range(cores)]
    assert max(shares) - min(shares) <= (2 if ranks <= cores else 1)


def test_ranks_next_to_their_gpus(node: Node) -> None:
    node.gpus = [Gpu(i, "G", 1, numa) for i, numa in enumerate((3, 3, 1, 0))]
    assert binding(node, 4) == [[6, 14], [7, 15], [2, 3, 10, 11], [0, 1, 8, 9]]
    # More ranks than cores near their GPUs, or a GPU of unknown place: the plain way, and nobody is left without.
    for homes in ((0, 0, 0, 0), (-1, 0, 1, 2)):
        node.gpus = [Gpu(i, "G", 1, numa) for i, numa in enumerate(homes)]
        assert binding(node, 4) == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]


def test_the_real_machine() -> None:
    here = topology.read()
    assert here.name == socket.gethostname()
    assert {cpu for core in here.cores for cpu in core.cpus} == os.sched_getaffinity(0)
    assert any(interface.kind == "loopback" for interface in here.interfaces)
    before = os.sched_getaffinity(0)
    try:
        cpus, threads = topology.bind(0, 1, here)
        assert os.sched_getaffinity(0) == set(cpus) == before
        assert threads == len(here.cores)
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture
def unnamed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_interface_is_the_routing_tables(unnamed: pytest.MonkeyPatch) -> None:
    assert choose_interface(topology.read(), "127.0.0.1").kind == "loopback"
    with pytest.raises(UserError, match=r"finds no way to no-such-host\.invalid"):
        choose_interface(topology.read(), "no-such-host.invalid")


def test_a_named_interface_wins(node: Node, unnamed: pytest.MonkeyPatch) -> None:
    unnamed.setenv("NCCL_SOCKET_IFNAME", "=ib0")
    assert choose_interface(node, "127.0.0.1").name == "ib0"
    unnamed.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert choose_interface(node, "127.0.0.1").name == "eth0"
    unnamed.setenv("GLOO_SOCKET_IFNAME", "eth7")
    with pytest.raises(UserError, match="no interface eth7") as raised:
        choose_interface(node, "127.0.0.1")
    assert "ib0" in str(raised.value.remedy)


def test_an_excluded_interface_is_not_chosen(node: Node, unnamed: pytest.MonkeyPatch) -> None:
    """NCCL reads ^eth0 as: any but eth0."""
    unnamed.setenv("NCCL_SOCKET_IFNAME", "^eth0")
    assert choose_interface(node, "127.0.0.1") == Interface("lo", "127.0.0.1", "loopback")


@pytest.mark.parametrize(
    ("nodes", "gpus", "parameters", "wanted"),
    [
        (1, 1, 1e9, {"stage": 0}),
        (2, 8, 1.6e9, {"stage": 1}),
        (1, 8, 8e9, {"stage": 2}),
        (1, 8, 20e9, {"stage": 3}),
        (4, 8, 50e9, {"stage": 3, "zero_hpz_partition_size": 8}),
        (4, 8, 70e9, {"stage": 3}),  # a second copy of the weights does not fit
        (1, 8, 70e9, {"stage": 3, "offload_optimizer": {"device": "cpu"}}),
    ],
)
def test_recommended_settings(nodes: int, gpus: int, parameters: float, wanted: dict[str, Any]) -> None:
    assert recommended(nodes, gpus, weights=2 * parameters, memory=80e9) == wanted


@given(st.sets(st.integers(0, 300), min_size=1))
def test_cpu_lists(cpus: set[int]) -> None:
    """Against Linux's own rules: ranges and single numbers, in order."""
    parts, ordered = [], sorted(cpus)
    while ordered:
        last = first = ordered.pop(0)
        while ordered and ordered[0] == last + 1:
            last = ordered.pop(0)
        parts.append(str(first) if first == last else f"{first}-{last}")
    assert parse_cpulist(",".join(parts) + "\n") == sorted(cpus)


def test_a_rank_that_is_shown_its_own_gpu_alone_is_bound_beside_it(node: Node) -> None:
    """Every rank sees one GPU, its own; together they are where they would be if each saw all."""
    homes = sorted({core.numa for core in node.cores})
    count = 2 * len(homes)
    together = Node("n", node.cores, [], [Gpu(rank, "G", 1, homes[rank // 2]) for rank in range(count)])
    wanted = binding(together, count)
    for rank in range(count):
        alone = Node("n", node.cores, [], [Gpu(rank, "G", 1, homes[rank // 2])])
        assert topology._beside(alone, rank, count) == wanted[rank]
    unknown = Node("n", node.cores, [], [Gpu(0, "G", 1)])
    shares = [topology._beside(unknown, rank, 2) for rank in range(2)]
    assert not set(shares[0]) & set(shares[1])
