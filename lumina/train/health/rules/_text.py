"""Words that several rules use."""

from __future__ import annotations


def others(found: list[str]) -> str:
    """` (and 2 more)` after the first of three, nothing after the only one."""
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
