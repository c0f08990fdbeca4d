"""Fixtures that several rooms' tests use: training runs (tests/runs), and packages with an entry point."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import tests.runs as real  # imported where it is used: it takes seconds, and most tests start no run

# A shell ignores SIGINT in what it starts in the background, and so do all that inherit it: tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says nothing on a machine that does other things too. The same examples on every run, so
# that a failure is of the change at hand; with LUMINA_NEW_DRAWS=1 they are others each time, which finds what these do
# not.
settings.register_profile(
    "untimed",
    settings.default,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=not os.environ.get("LUMINA_NEW_DRAWS"),
    database=None,
)
settings.load_profile("untimed")


SEED = 20_240_731  # not one that a test itself chooses


def _seed() -> None:
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(SEED)  # torch.manual_seed would note every call for CUDA


@pytest.fixture(scope="module", autouse=True)
def seeded_file() -> None:
    """What the fixtures of a file draw does not depend on the files that this process ran before."""
    _seed()


@pytest.fixture(autouse=True)
def seeded_test() -> None:
    """Nor what a test draws on the tests before it: a bound on rounding errors holds or not, whatever the order."""
    _seed()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of real runs has longer than they have: their patience ends first, which says where each rank stands."""
    for item in items:
        if "runs" in getattr(item, "fixturenames", ()) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[real.Runs]:
    """Starts real runs; nothing that it started outlives the tests."""
    import tests.runs as real

    started = real.Runs(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 short conversations."""
    import tests.runs as real

    return real.write_conversations(tmp_path_factory.mktemp("data") / "train.jsonl", 40, seed=11)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs, emptied afterwards: pytest keeps the last sessions' folders, and checkpoints are large."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def install(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package of one module with one entry point, as pip would leave it: install(group, name, source). The
    entry point is the module's THING."""
    from lumina.config import registry

    installed: list[str] = []

    def install(group: str, name: str, source: str, package: str = "staircase") -> None:
        folder = tmp_path_factory.mktemp(package)
        (folder / f"{package}.py").write_text(source)
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {package}:THING\n")
        monkeypatch.syspath_prepend(folder)
        registry.forget()
        installed.append(package)

    yield install
    registry.forget()
    for package in installed:
        sys.modules.pop(package, None)
