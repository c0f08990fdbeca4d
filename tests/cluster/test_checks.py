"""What made-up facts of nodes are judged to be: who is named, how bad it is, and that there is a remedy."""

from __future__ import annotations

import subprocess
import sys
import uuid
from typing import Any

import pytest

from lumina.cluster.hostfile import Host
from lumina.cluster.preflight import checks
from lumina.cluster.preflight.checks import HEAD, NodeFinding

GIB = 2**30
VERSIONS = {"lumina": "0.1.0", "Python": "3.11.7", "torch": "2.13.0", "DeepSpeed": "0.19.8", "CUDA": None, "NCCL": None}
CUDA = {**VERSIONS, "CUDA": "12.8", "NCCL": "2.27.3"}


def machine(gpus: int = 0, **changes: Any) -> dict[str, Any]:
    card = {"name": "H100", "memory": 80 * GIB, "clock": 1980}
    facts = {
        "versions": CUDA if gpus else VERSIONS, "torch_error": None, "cores": 4, "cpus": 8, "visible": gpus,
        "gpus": [{"index": i, **card} for i in range(gpus)], "infiniband": [], "network_error": None,
        "interface": {"name": "eth0", "address": "10.0.0.1", "kind": "ethernet", "speed": 0}, "summary": "4 cores",
        "machine": uuid.uuid4().hex,
    }  # fmt: skip
    return {**facts, **changes}


def bad(results: list[NodeFinding]) -> list[tuple[str, str]]:
    """(node, level) of what is not OK; each with something to do."""
    assert all(finding.remedy for _, finding in results if finding.level != "OK")
    return [(node, finding.level) for node, finding in results if finding.level != "OK"]


# --- Versions ---


def test_equal_versions_are_one_line_for_each_node() -> None:
    results = checks.versions({"a": machine(), "b": machine()}, VERSIONS)
    assert bad(results) == []
    assert [node for node, _ in results] == ["a", "b"]
    assert "torch 2.13.0" in results[0].finding.detail


@pytest.mark.parametrize("name", ["lumina", "torch", "DeepSpeed", "CUDA", "NCCL"])
def test_the_node_with_another_version_is_named(name: str) -> None:
    odd = machine(2, versions={**CUDA, name: "9.9"})
    results = checks.versions({"a": machine(2), "b": odd, "c": machine(2)}, VERSIONS)
    assert bad(results) == [("b", "FAIL")]
    wrong = next(finding for node, finding in results if node == "b")
    assert wrong.detail == f"{name} 9.9, where the others have {CUDA[name]}"
    assert str(CUDA[name]) in wrong.remedy


def test_of_two_nodes_the_one_unlike_the_head_is_named() -> None:
    odd = machine(versions={**VERSIONS, "torch": "2.12.0"})
    assert bad(checks.versions({"a": odd, "b": machine()}, VERSIONS)) == [("a", "FAIL")]
    assert bad(checks.versions({"a": machine(), "b": odd}, VERSIONS)) == [("b", "FAIL")]


def test_a_head_unlike_its_nodes_is_named_for_what_it_needs() -> None:
    nodes = {"a": machine(), "b": machine()}
    assert bad(checks.versions(nodes, {**VERSIONS, "lumina": "0.2.0"})) == [(HEAD, "FAIL")]
    assert bad(checks.versions(nodes, {**VERSIONS, "Python": "3.12.1"})) == [(HEAD, "FAIL")]
    assert bad(checks.versions(nodes, {**VERSIONS, "torch": None, "DeepSpeed": None})) == []  # a login node


def test_python_differs_a_little_or_much() -> None:
    little, much = ({**VERSIONS, "Python": version} for version in ("3.11.9", "3.12.0"))
    nodes = {"a": machine(), "b": machine(), "c": machine(versions=little), "d": machine(versions=much)}
    assert bad(checks.versions(nodes, VERSIONS)) == [("c", "WARN"), ("d", "FAIL")]


def test_missing_and_broken_packages() -> None:
    none = machine(versions={**VERSIONS, "DeepSpeed": None})
    broken = machine(torch_error="OSError: libcudart.so.12: cannot open shared object file")
    results = checks.versions({"a": machine(), "b": none, "c": broken}, VERSIONS)
    assert bad(results) == [("b", "FAIL"), ("c", "FAIL")]
    assert [finding.detail for node, finding in results if node != "a"] == [
        "no DeepSpeed",
        "torch cannot be imported: OSError: libcudart.so.12: cannot open shared object file",
    ]
    nobody = machine(versions={**VERSIONS, "torch": None})
    assert bad(checks.versions({"a": nobody, "b": nobody}, VERSIONS)) == [("a", "FAIL"), ("b", "FAIL")]


# --- Slots and GPUs ---


@pytest.mark.parametrize(
    ("gpus", "slots", "level"),
    [(8, 8, "OK"), (8, 9, "FAIL"), (8, 4, "WARN"), (0, 4, "OK"), (0, 5, "WARN"), (0, 8, "WARN"), (0, 9, "FAIL")],
)
def test_slots_are_gpus_or_at_most_cores(gpus: int, slots: int, level: str) -> None:
    (result,) = checks.slots([Host("a", slots)], {"a": machine(gpus)})
    assert result.finding.level == level
    assert ("no GPU" in result.finding.detail) == (gpus == 0)


def test_a_node_without_gpus_among_others_with_some() -> None:
    results = checks.slots([Host("a", 2), Host("b", 2), Host("lost", 2)], {"a": machine(2), "b": machine()})
    assert bad(results) == [("b", "FAIL")]


def test_one_machine_under_two_names() -> None:
    twice = machine(2)
    hosts = [Host("a", 2), Host("b", 2), Host("c", 2)]
    results = checks.slots(hosts, {"a": twice, "b": machine(2), "c": dict(twice)})
    assert bad(results) == [("c", "FAIL")]
    assert results[2].finding.detail == "the same machine as a"


def test_no_gpu_seen_by_a_torch_for_cuda() -> None:
    assert bad(checks.slots([Host("a", 1)], {"a": machine(versions=CUDA)})) == [("a", "WARN")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory": 40 * GIB}, "GPU 1 has 40.0 GiB, where most have 80.0"),
        ({"clock": 1410}, "GPU 1 clocks at most 1410 MHz, where most reach 1980"),
        ({"name": "A100"}, "GPU 1 is A100, where most are H100"),
    ],
)
def test_gpus_differ(change: dict[str, Any], said: str) -> None:
    nodes = {"a": machine(4), "b": machine(4)}
    assert bad(checks.gpus(nodes)) == []
    nodes["b"]["gpus"][1] = {**nodes["b"]["gpus"][1], **change}
    results = checks.gpus(nodes)
    assert bad(results) == [("b", "WARN")]
    assert results[1].finding.detail == said


def test_a_retired_page_is_no_difference() -> None:
    nodes = {"a": machine(1), "b": machine(1)}
    nodes["b"]["gpus"][0]["memory"] -= 65536
    assert bad(checks.gpus(nodes)) == []


# --- Network, folder, clock ---


def test_interfaces() -> None:
    def on(kind: str, name: str = "x0", **changes: Any) -> dict[str, Any]:
        return machine(interface={"name": name, "address": "10.0.0.1", "kind": kind, "speed": 0}, **changes)

    same = {"a": on("ethernet"), "b": on("ethernet")}
    assert bad(checks.network(same)) == []
    assert bad(checks.network({**same, "c": on("infiniband")})) == [("c", "WARN")]
    assert bad(checks.network({**same, "c": on("loopback", "lo")})) == [("c", "FAIL")]
    assert bad(checks.network({"a": on("loopback", "lo")})) == []
    assert bad(checks.network({**same, "c": on("ethernet", infiniband=["mlx5_0:1"])})) == [("c", "WARN")]
    assert bad(checks.network({**same, "c": machine(interface=None, network_error="no way")})) == [("c", "FAIL")]


def test_the_shared_folder() -> None:
    fine = {"there": True, "seen": True, "wrote": None, "free": 100 * GIB}
    answers = {
        "fine": fine, "absent": {**fine, "there": False}, "other": {**fine, "seen": False},
        "readonly": {**fine, "wrote": "Read-only file system"}, "oneway": fine, "low": {**fine, "free": 5 * GIB},
        "full": {**fine, "free": GIB // 2},
    }  # fmt: skip
    results = checks.shared("/runs", answers, {name: name != "oneway" for name in answers})
    by_area = {
        area: {node: finding.level for node, finding in results if finding.name == area} for area in ("shared", "disk")
    }
    assert by_area["shared"] == {
        "fine": "OK", "absent": "FAIL", "other": "FAIL", "readonly": "FAIL", "oneway": "FAIL", "low": "OK", "full": "OK"
    }  # fmt: skip
    assert {node: level for node, level in by_area["disk"].items() if level != "OK"} == {"low": "WARN", "full": "FAIL"}
    assert all(finding.remedy for _, finding in results if finding.level != "OK")


def test_a_clock_is_wrong_by_more_than_is_uncertain() -> None:
    offsets = {"a": (0.01, 0.02), "b": (-0.02, 0.02)}
    assert bad(checks.clocks(offsets)) == []
    assert bad(checks.clocks({**offsets, "c": (3.0, 0.1)})) == [("c", "WARN")]
    assert bad(checks.clocks({**offsets, "c": (3.0, 4.0)})) == []  # a slow answer says nothing
    results = checks.clocks({**offsets, "c": (-3600.0, 0.1)})
    assert bad(results) == [("c", "FAIL")]
    assert "behind" in results[-1].finding.detail
    assert bad(checks.clocks({"a": (-60.0, 0.1)})) == [("a", "FAIL")]


def test_nodes_that_agree_against_the_head_are_right() -> None:
    results = checks.clocks({"a": (100.0, 0.01), "b": (100.1, 0.01)})
    assert bad(results) == [(HEAD, "FAIL")]
    assert "behind" in results[0].finding.detail


# --- Between the nodes ---


def test_few_nodes_all_try_all_and_many_a_ring_and_the_first() -> None:
    assert checks.links(["a"]) == []
    assert set(checks.links(["a", "b", "c"])) == {(x, y) for x in "abc" for y in "abc" if x != y}
    names = [str(n) for n in range(1000)]
    pairs = checks.links(names)
    assert len(pairs) == len(set(pairs)) == 1000 + 998  # the last one's next is the first
    assert all(any(a == name for a, _ in pairs) and any(b == name for _, b in pairs) for name in names)
    assert {a for a, b in pairs if b == "0"} == set(names[1:])


def test_a_closed_port_is_named_with_both_ends() -> None:
    results = checks.ports({"a": {"b (10.0.0.2 port 5)": "Permission denied"}}, {"a": ["b"], "b": ["a"]})
    assert bad(results) == [("a", "FAIL")]
    assert results[0].finding.detail == "cannot connect to b (10.0.0.2 port 5): Permission denied"


def test_a_slow_network() -> None:
    quick = {"latency": 20e-6, "bandwidth": 40e9, "bytes": 2**30}
    assert bad(checks.all_reduce("nccl", {"a": quick})) == []
    assert bad(checks.all_reduce("nccl", {"a": {**quick, "latency": 0.02}})) == [("a", "WARN")]
    assert bad(checks.all_reduce("nccl", {"a": {**quick, "bandwidth": 10e6}})) == [("a", "WARN")]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("root@n1: Permission denied (publickey).", "ssh-copy-id"),
        ("ssh: connect to host n1 port 22: No route to host", "Is it up?"),
        ("Connection timed out during banner exchange", "Is it up?"),
        ("no answer to the command that ssh was given within 60 s", "~/.bashrc"),
        ("ssh: connect to host n1 port 22: Connection refused", "no sshd"),
        ("ssh: Could not resolve hostname n1: Name or service not known", "DNS"),
        ("bash: line 1: cd: /data/me: No such file or directory", "shared file system"),
        ("bash: line 1: exec: /x/bin/python: cannot execute: No such file or directory", "Python"),
        ("/x/bin/python: No module named lumina.cluster.preflight.probe", "Install Lumina"),
        ("Host key verification failed.", "known_hosts"),
        ("something new", "by hand"),
    ],
)
def test_what_to_do_about_an_unreachable_node(error: str, says: str) -> None:
    result = checks.unreachable("n1", error)
    assert (result.node, result.finding.level, result.finding.detail) == ("n1", "FAIL", error)
    assert says in result.finding.remedy


def test_the_head_needs_no_torch() -> None:
    code = "import sys, lumina.cluster.preflight.run, lumina.cluster.preflight.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
