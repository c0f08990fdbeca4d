"""Prints the standing adversary's table: each door, how many attacks there are on it, and what must happen.

    python -m tests.adversary

All of it is collected from the tests themselves: a door is a file, whose first line says what it is; an attack is a
test or a line of its table; what must happen is the test's name.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent


class Collected:
    """The attacks that pytest finds, as a plugin of it: {file: {what must happen: how many}}."""

    def __init__(self) -> None:
        self.doors: dict[str, tuple[str, Counter[str]]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if item.path.name == "test_table.py":  # of this table itself
                continue
            module: Any = item.getparent(pytest.Module)
            says = " ".join((module.obj.__doc__ or "").split()).partition(". ")[0]
            _, tests = self.doors.setdefault(item.path.name, (says, Counter()))
            tests[getattr(item, "originalname", item.name)] += 1


def main() -> int:
    collected, said = Collected(), io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main(["--collect-only", "-q", "-p", "no:xdist", str(FOLDER)], plugins=[collected])
    if code:
        print(said.getvalue(), file=sys.stderr)
        return int(code)
    for name, (says, tests) in sorted(collected.doors.items()):
        print(f"{tests.total():5}  {name}: {says}")
        for test, count in tests.items():
            print(f"         {count:5}  {test.removeprefix('test_').replace('_', ' ')}")
    print(f"{sum(tests.total() for _, tests in collected.doors.values()):5}  attacks at {len(collected.doors)} doors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
