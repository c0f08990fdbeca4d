"""Hostfiles in DeepSpeed's format; every mistake is found at its line."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.cluster.hostfile import Host, read_hostfile
from lumina.config import UserError

names = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True)
hosts = st.lists(st.builds(Host, names, st.integers(1, 64)), min_size=1, max_size=9, unique_by=lambda host: host.name)
between = st.sampled_from(["", "\n", "# a comment\n", "   \n\t# another slots=3\n"])


@given(hosts, st.data())
def test_what_is_written_is_read(written: list[Host], data: st.DataObject) -> None:
    text = ""
    for host in written:
        assignment = data.draw(st.sampled_from([f"slots={host.slots}", f"slots = {host.slots}  # of 64"]))
        text += data.draw(between) + data.draw(st.sampled_from(["", "  "])) + f"{host.name} {assignment}\n"
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as file:
        file.write(text)
        file.flush()
        assert read_hostfile(file.name) == written


def test_a_host_without_slots_has_one(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a\nb slots=2")
    assert read_hostfile(tmp_path / "hosts") == [Host("a", 1), Host("b", 2)]


@pytest.mark.parametrize(
    "line",
    ["n1 slots=0", "n1 slots=-2", "n1 slots=two", "n1 slots", "n1 slots=2 gpus=4", "n1 n2", "n1,n2 slots=1 x",
     "-oProxyCommand=true slots=1", "n[1-2] slots=1", "n1,n2 slots=1", "n1;reboot slots=1", "a@b@c",
     "n1 slots=9999999999"],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"# two hosts\nn0 slots=1\n{line}\n")
    with pytest.raises(UserError) as raised:
        read_hostfile(tmp_path / "hosts")
    assert "line 3" in raised.value.message
    assert repr(line) in raised.value.message
    assert raised.value.remedy


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n0 slots=1\n\nn0 slots=2\n")
    with pytest.raises(UserError, match=r"line 3: n0 is there twice"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize("line", ["n1:2222 slots=8", "n1:8", "ann@n1:22 slots=2"])
def test_a_port_is_no_part_of_a_name(line: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"n0 slots=1\n{line}\n")
    with pytest.raises(UserError, match=r"line 2: \S+ names a port") as raised:
        read_hostfile(tmp_path / "hosts")
    assert "~/.ssh/config" in str(raised.value.remedy)


def test_addresses_and_users_are_names(tmp_path: Path) -> None:
    names = ["192.0.2.7", "fe80::1", "2001:db8::8:80", "ann@n1", "n_1.example.org"]
    (tmp_path / "hosts").write_text("".join(f"{name} slots=2\n" for name in names))
    assert read_hostfile(tmp_path / "hosts") == [Host(name, 2) for name in names]


@pytest.mark.parametrize("text", ["", "\n\n", "# n0 slots=1\n"])
def test_a_file_without_hosts_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match="names no host"):
        read_hostfile(tmp_path / "hosts")


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the hostfile"):
        read_hostfile(tmp_path / "hosts")
