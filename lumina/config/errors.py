"""The one exception for a user's mistake, and the hint that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do.

    The command line prints it as ``error: …`` on stderr and exits 2, without a traceback. Broken invariants of the
    program itself are `assert`s and keep theirs.
    """

    def __init__(self, message: str, remedy: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message if remedy is None else f"{message}\n  {remedy}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as `` Did you mean `hidden_size`?`` (leading space), or the empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""
