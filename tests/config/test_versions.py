"""Versions outside of setup.py's bounds: which are refused, with what remedy, and which are only warned of."""

import importlib.metadata
import logging

import pytest

from lumina.config import UserError, versions
from lumina.plan import environment

STATED = ["torch<2.14,>=2.11", "deepspeed<0.20,>=0.19.8", 'triton<3.10,>=3.6; platform_system == "Linux"', "numpy>=99"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = {"torch": "2.13.0+cu130", "deepspeed": "0.19.8", "triton": "3.7.1", "numpy": "1.0"}
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: STATED)

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return found


def test_versions_within_the_bounds_pass(installed: dict[str, str]) -> None:
    assert versions.untried() == []
    versions.refuse_untried()


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "2.10.1"), ("triton", "3.3.1"), ("deepspeed", "0.18.9"), ("deepspeed", "0.20.0")]
)
def test_older_ones_and_another_deepspeed_are_refused(installed: dict[str, str], name: str, version: str) -> None:
    installed[name] = version
    with pytest.raises(UserError, match=f"{name} {version}") as caught:
        versions.refuse_untried()
    assert f"pip install '{name}" in str(caught.value)
    assert [
        f.level
        for f in (*environment.check_packages(), *environment.check_kernels())
        if f.name == name and version in f.detail
    ] == ["FAIL"]


@pytest.mark.parametrize(("name", "version"), [("torch", "2.14.0"), ("triton", "3.10.0")])
def test_newer_ones_are_warned_of(
    installed: dict[str, str], caplog: pytest.LogCaptureFixture, name: str, version: str
) -> None:
    installed[name] = version
    with caplog.at_level(logging.WARNING):
        versions.refuse_untried()
    assert f"{name} {version}" in caplog.text
    assert "WARN" in [f.level for f in (*environment.check_packages(), *environment.check_kernels()) if f.name == name]


def test_a_vendors_build_counts_as_its_release(installed: dict[str, str]) -> None:
    installed["torch"] = "2.11.0a0+8a7f3c1.nv26.2"
    assert versions.untried() == []


def test_the_bounds_are_found_under_the_former_name_but_not_in_another_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone that was updated and not installed again; and `lumina` of the package index."""
    of_lumina = STATED

    def requires(name: str) -> list[str]:
        if name != "lumina":
            raise importlib.metadata.PackageNotFoundError(name)
        return of_lumina

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert versions.bounds("torch") == "<2.14,>=2.11"
    of_lumina = ["torch<1.9", "PyQt5"]
    assert versions.bounds("torch") == ""
