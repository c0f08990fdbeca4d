"""Fixtures of the tests that start training runs (tests/runs.py)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import runs as real  # imported where it is used: it takes seconds, and most tests start no run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[real.Runs]:
    """Starts real runs; nothing that it started outlives the tests."""
    import runs as real

    started = real.Runs(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 short conversations."""
    import runs as real

    return real.write_conversations(tmp_path_factory.mktemp("data") / "train.jsonl", 40, seed=11)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs, emptied afterwards: pytest keeps the last sessions' folders, and checkpoints are large."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
