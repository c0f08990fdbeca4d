"""The preflight on a real cluster: nothing to say of a healthy one; what is wrong is named, with its node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.multinode.cluster import BIN, HEAD, ROOT, Cluster

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
HERE = {"disk", "all-reduce", "slots"}  # may be a WARN on a machine that is full or busy, or whose torch is for CUDA
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # the nodes would share it, which NCCL refuses
Findings = dict[tuple[str, str], dict[str, Any]]


def ask(cluster: Cluster, output: Path, hostfile: str = "", *options: str) -> tuple[int, Findings]:
    """The exit code, and what is not OK, by node and name; the first where there are several."""
    words = [str(BIN / "lumina"), "check-environment", "--hostfile", hostfile or cluster.hostfile()]
    done = cluster.run(HEAD, [*words, "--output-dir", str(output), "--json", *options], patience=100, **NO_GPU)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"] == (done.returncode == 0)
    bad: Findings = {}
    for finding in report["findings"]:
        if finding["level"] != "OK":
            assert finding["remedy"], finding
            bad.setdefault((finding["node"], finding["name"]), finding)
    left = {name: cluster.processes(name, "preflight.probe") for name in cluster.places if cluster.places[name].holder}
    assert not any(left.values()), left
    assert list(output.iterdir()) == []
    return done.returncode, bad


def failures(bad: Findings) -> set[tuple[str, str]]:
    return {key for key, finding in bad.items() if finding["level"] == "FAIL"}


def run(cluster: Cluster, name: str, *words: str) -> None:
    done = cluster.run(name, words)
    assert done.returncode == 0, done.stdout


@contextmanager
def changed(cluster: Cluster, name: str, do: list[str], undo: list[str]) -> Iterator[None]:
    run(cluster, name, *do)
    try:
        yield
    finally:
        run(cluster, name, *undo)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_a_healthy_cluster(cluster: Cluster, output: Path) -> None:
    words = [str(BIN / "lumina"), "check-environment", "--hostfile", cluster.hostfile(), "--output-dir", str(output)]
    done = cluster.run(HEAD, [*words, "--json"], **NO_GPU)
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    names = ["ssh", "versions", "slots", "gpu", "network", "shared", "disk", "clock", "port", "all-reduce"]
    assert [(f["node"], f["name"]) for f in report["findings"]] == [(n, name) for n in ("n0", "n1") for name in names]
    for finding in report["findings"]:
        assert finding["level"] == "OK" or (finding["name"] in HERE and finding["level"] == "WARN"), finding
    assert [report["nodes"][n]["interface"]["address"] for n in ("n0", "n1")] == ["10.77.0.10", "10.77.0.11"]
    for answer in report["all_reduce"].values():
        assert answer["latency"] > 0
        assert answer["bandwidth"] > 0
    assert set(report["all_reduce"]) == {"n0", "n1"}


def test_what_is_wrong_with_nodes_is_found(cluster: Cluster, output: Path, tmp_path: Path) -> None:
    """On one node another version, and too many slots; on the other another folder behind the output's name."""
    other = tmp_path / "__init__.py"
    real = ROOT / "lumina/__init__.py"
    other.write_text(real.read_text().replace('__version__ = "', '__version__ = "9.'))
    wrong_slots = tmp_path / "hostfile"
    wrong_slots.write_text("n0 slots=1\nn1 slots=4096\n")
    with (
        changed(cluster, "n1", ["mount", "--bind", str(other), str(real)], ["umount", str(real)]),
        changed(cluster, "n0", ["mount", "-t", "tmpfs", "none", str(output)], ["umount", str(output)]),
    ):
        code, bad = ask(cluster, output, str(wrong_slots))
        assert cluster.run("n0", ["ls", "-A", str(output)]).stdout == "", "left in the folder that only n0 sees"
    assert code == 1
    assert failures(bad) == {("n1", "versions"), ("n1", "slots"), ("n0", "shared")}
    assert "lumina 9." in bad["n1", "versions"]["detail"]
    assert "slots=4096" in bad["n1", "slots"]["detail"]
    assert str(output) in bad["n0", "shared"]["detail"]
    assert "ount the same file system" in bad["n0", "shared"]["remedy"]


def test_a_closed_port_is_found_while_ssh_works(cluster: Cluster, output: Path) -> None:
    route = ["prohibit", "10.77.0.11/32"]
    with changed(cluster, "n0", ["ip", "route", "add", *route], ["ip", "route", "del", *route]):
        code, bad = ask(cluster, output)
    assert code == 1
    assert failures(bad) == {("n0", "port"), ("n1", "port")}
    assert "cannot connect to n1 (10.77.0.11 port" in bad["n0", "port"]["detail"]
    assert "cannot connect to n0 (10.77.0.10 port" in bad["n1", "port"]["detail"]
    assert "firewall" in bad["n0", "port"]["remedy"]


def test_an_unreachable_node_is_found_and_the_others_are_asked(cluster: Cluster, output: Path) -> None:
    cluster.kill("n1")
    try:
        code, bad = ask(cluster, output)
    finally:
        cluster.revive("n1")
    assert code == 1
    assert failures(bad) == {("n1", "ssh")}
    assert "n1" in bad["n1", "ssh"]["detail"]
    assert "Is it up?" in bad["n1", "ssh"]["remedy"]


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime (apt-get install faketime)")
def test_a_skewed_clock_is_found(cluster: Cluster, output: Path) -> None:
    extra = cluster.folder / "sshd.n1.extra"
    # Only what the time is, not how fast it passes: waiting goes on as before.
    extra.write_text(f"SetEnv LD_PRELOAD={FAKETIME} FAKETIME=-90s FAKETIME_DONT_FAKE_MONOTONIC=1\n")
    try:
        cluster.kill("n1")
        cluster.revive("n1")
        code, bad = ask(cluster, output)
    finally:
        extra.unlink()
        cluster.kill("n1")
        cluster.revive("n1")
    assert code == 1
    assert failures(bad) == {("n1", "clock")}
    seconds = float(bad["n1", "clock"]["detail"].split(" s behind")[0])
    assert seconds == pytest.approx(90, abs=5)  # the uncertainty, on a busy machine
    assert "chrony" in bad["n1", "clock"]["remedy"]
