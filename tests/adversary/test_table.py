"""The table of attacks that `python -m tests.adversary` prints, and what SECURITY.md says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SECURITY = FOLDER.parents[1] / "SECURITY.md"


def test_the_counts_of_the_security_policy_are_those_of_the_tests(request: pytest.FixtureRequest) -> None:
    found = re.search(r"as tables: ([\d,]+) of them at (\d+) doors", SECURITY.read_text(encoding="utf-8"))
    assert found is not None
    files = {path.name for path in FOLDER.glob("test_*.py")} - {Path(__file__).name}
    assert int(found[2]) <= len(files) <= int(found[2]) + 5, "SECURITY.md: the number of doors"
    items = [item for item in request.session.items if item.path.parent == FOLDER and item.path != Path(__file__)]
    if {item.path.name for item in items} < files - {"test_kills.py"}:  # which is `long`, all of it
        pytest.skip("counts the attacks where all of tests/adversary is collected (make test)")
    said = int(found[1].replace(",", ""))
    assert said * 0.9 <= len(items) <= said * 1.3, f"SECURITY.md: {len(items)} attacks were collected"
