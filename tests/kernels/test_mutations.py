"""Every deliberately broken kernel is caught: see mutations.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long  # it is about the other tests: what they notice changes only when kernels or their tests do
@pytest.mark.timeout(600)
def test_every_mutant_is_caught() -> None:
    run = subprocess.run([sys.executable, "-m", "tests.kernels.mutations"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "MISSED" not in run.stdout


@pytest.mark.long
def test_a_mutant_that_changes_nothing_would_be_reported() -> None:
    """The runner itself: a replacement by the same text is missed, and the exit status says so."""
    code = (
        "import dataclasses; from tests.kernels import mutations;"
        "harmless = dataclasses.replace(mutations.MUTATIONS[0], new=mutations.MUTATIONS[0].old);"
        "mutations.MUTATIONS = (harmless,);"
        "raise SystemExit(mutations.main([]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1, run.stderr
    assert "MISSED" in run.stdout
