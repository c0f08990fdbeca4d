"""A checkpoint that somebody changed: only the manifest's files are opened, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adversary.checkpoint_attacks import ATTACKS, outcome


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_becomes_of_it(attack: str, tmp_path: Path) -> None:
    assert outcome(attack, tmp_path) is None


def test_the_same_without_asserts(tmp_path: Path) -> None:
    """Under `python -O` an assert is nothing: none may stand between a file and the weights."""
    script = "from tests.adversary.checkpoint_attacks import main; main()"
    command = [sys.executable, "-O", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
