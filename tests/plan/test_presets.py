"""The table of docs/presets.md is what its command prints, quickly and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lumina.plan.presets import duration

DOCUMENT = Path(__file__).parents[2] / "docs" / "presets.md"


def test_the_document_has_the_table_that_the_command_prints() -> None:
    code = (
        "import runpy, sys; runpy.run_module('lumina.plan.presets', run_name='__main__');"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 9
    assert done.stdout in DOCUMENT.read_text()


@pytest.mark.parametrize(("hours", "text"), [(0.15, "9 min"), (1.0, "1.0 h"), (47.9, "47.9 h"), (72.0, "3.0 days")])
def test_durations(hours: float, text: str) -> None:
    assert duration(hours) == text
